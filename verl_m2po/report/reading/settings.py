"""What a run was: its loss, staleness and seed, from the config beside its log, else from its name."""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

# The last is where `hydra.run.dir=RUN/hydra` puts it, as our own runs do.
CONFIG_FILES = ("config.yaml", "config.json", ".hydra/config.yaml", "hydra/.hydra/config.yaml")
# A resolved verl config is about 60 kB; anything far beyond is not one.
LARGEST_CONFIG_BYTES = 5_000_000

# At the end of the name or of one of its folders: "m2po-s256-seed3", "seed3/m2po-s256".
SEED_IN_NAME = re.compile(r"(?:^|(?<=/)|[-_.])seed[-_=]?(\d+)(?=$|/)", re.IGNORECASE)
# A bare s with a number begins no name ("s1-math"), but may be a folder of its own ("m2po/s256").
STALENESS_IN_NAME = re.compile(
    r"(?:(?:^|[-_./])stale(?:ness)?[-_=]?|[-_.]s[-_=]?|(?:^|/)s(?=\d+(?:$|/)))(\d+)(?=$|[-_./])", re.IGNORECASE
)
ON_POLICY_IN_NAME = re.compile(r"(?:^|[-_./])on[-_]?policy(?=$|[-_./])", re.IGNORECASE)
# The options of the Hydra group `loss`, longest first, so that m2po_clip is not read as m2po.
LOSS_OPTIONS = Path(__file__).parents[2] / "config" / "loss"
LOSSES_IN_NAME = sorted((option.stem for option in LOSS_OPTIONS.glob("*.yaml")), key=lambda name: (-len(name), name))

# The label comes first, because options of the group `loss` may share a registered loss.
LOSS_KEYS = (
    "algorithm.policy_loss_label",
    "algorithm.policy_loss",
    "actor_rollout_ref.actor.policy_loss.selected",
    "actor_rollout_ref.actor.policy_loss.loss_mode",
    "loss",
)
SEED_KEYS = ("seed", "data.seed", "actor_rollout_ref.actor.data_loader_seed")
INTERPOLATION = re.compile(r"^\$\{([\w.]+)\}$")


@dataclass(frozen=True)
class Settings:
    """What is known of a run.

    Args:
        base_name: The run's name without its seed.
        loss: Name of the policy loss; None if unknown.
        staleness_updates: Age of the data in optimizer updates, 0 for on-policy; None if unknown.
        mode: verl's trainer mode, None if unknown.
        seed: None if unknown.
        threshold: M2PO's limit on the second moment; None if unknown.
        config: Dotted key to value of the config beside the log; empty if there is none.
    """

    base_name: str
    loss: str | None = None
    staleness_updates: int | None = None
    mode: str | None = None
    seed: int | None = None
    threshold: float | None = None
    config: dict[str, object] = field(default_factory=dict)


def flatten(tree: object, prefix: str = "") -> dict[str, object]:
    """Dotted keys of nested mappings; lists are leaves."""
    if not isinstance(tree, dict):
        return {prefix: tree} if prefix else {}
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def config_file(folder: Path) -> Path | None:
    """The config beside a log in `folder`, if there is one."""
    # os.path, because Path.is_file raises where a folder may not be entered.
    return next((folder / name for name in CONFIG_FILES if os.path.isfile(folder / name)), None)


def read_config(folder: Path) -> tuple[dict[str, object], list[str]]:
    """The flattened config in `folder`, as data only, and a line if it could not be read; ({}, []) if there is none."""
    path = config_file(folder)
    if path is None:
        return {}, []
    try:
        if path.stat().st_size > LARGEST_CONFIG_BYTES:
            return {}, [f"{path}: larger than {LARGEST_CONFIG_BYTES} bytes, so not read as a config"]
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        return {}, [f"{path}: not readable ({error.strerror}); loss and staleness come from the name"]
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        return {}, [f"{path}: not readable as YAML ({type(error).__name__}); loss and staleness come from the name"]
    return flatten(tree), []


def lookup(config: dict[str, object], key: str) -> object:
    """The value at `key`, following plain ${other.key} references; no resolver is ever run."""
    value = config.get(key)
    for _ in range(10):
        match = INTERPOLATION.match(value) if isinstance(value, str) else None
        if match is None:
            break
        value = config.get(match[1])
    return None if isinstance(value, str) and "${" in value else value


def _first(config: dict[str, object], keys: tuple[str, ...], kind: type) -> object:
    for key in keys:
        value = lookup(config, key)
        if isinstance(value, kind) and not isinstance(value, bool):
            return value
    return None


def _loss_in_name(name: str) -> str | None:
    """The option of `loss` that the name begins with, without its folders, else one anywhere in it; the longest."""
    plain = re.sub(r"[-./]", "_", name.lower())
    start = re.sub(r"[-.]", "_", name.lower().rsplit("/", 1)[-1])
    return next(
        (loss for loss in LOSSES_IN_NAME if f"{start}_".startswith(f"{loss}_")),
        next((loss for loss in LOSSES_IN_NAME if f"_{loss}_" in f"_{plain}_"), None),
    )


def _loss(config: dict[str, object], name: str) -> str | None:
    """verl's `vanilla` is PPO's clip; with group-relative advantages the field calls it GRPO."""
    loss = _first(config, LOSS_KEYS, str) or _loss_in_name(name)
    is_grpo = loss == "vanilla" and lookup(config, "algorithm.adv_estimator") in (None, "grpo")
    return "grpo" if is_grpo else str(loss) if loss else None


def _staleness(config: dict[str, object], mode: str | None, name: str) -> int | None:
    keys = (f"trainer.v1.{mode}.staleness_updates", "staleness_updates")
    staleness = _first(config, keys, int)
    if staleness is not None:
        return int(staleness)  # pyright: ignore[reportArgumentType]
    if mode == "sync":
        return 0
    match = STALENESS_IN_NAME.search(name)
    if match:
        return int(match[1])
    return 0 if ON_POLICY_IN_NAME.search(name) else None


def _threshold(config: dict[str, object], loss: str | None) -> float | None:
    keys = (f"actor_rollout_ref.actor.policy_loss.{loss}.threshold", "threshold")
    for key in keys:
        value = lookup(config, key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            # inf switches the trust region off: there is no limit to draw.
            return float(value) if math.isfinite(value) else None
    return None


def settings(name: str, config: dict[str, object]) -> Settings:
    """Settings from the config where it says them, else from the name, such as ``m2po-s256-seed3``."""
    in_name = SEED_IN_NAME.search(name)
    base_name = SEED_IN_NAME.sub("", name).replace("//", "/").strip("/") or name
    seed = int(in_name[1]) if in_name else _first(config, SEED_KEYS, int)
    mode = lookup(config, "trainer.v1.trainer_mode")
    mode = mode if isinstance(mode, str) else None
    loss = _loss(config, base_name)
    return Settings(
        base_name=base_name,
        loss=loss,
        staleness_updates=_staleness(config, mode, base_name),
        mode=mode,
        seed=seed,  # pyright: ignore[reportArgumentType]
        threshold=_threshold(config, loss),
        config=config,
    )
