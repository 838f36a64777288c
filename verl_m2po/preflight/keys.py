"""Was a key added with `+` that is a misspelling of one of ours? Hydra suggests the `+`, and nothing would read it."""

import difflib
from collections.abc import Iterator, Mapping
from importlib import resources

from omegaconf import DictConfig, OmegaConf

from verl_m2po.preflight.problem import Problem

SIMILARITY = 0.8


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield every key that was added on the command line beside one of ours with nearly the same name."""
    ours = set(our_keys())
    for override in OmegaConf.select(config, "hydra.overrides.task") or []:
        key, _, value = override.lstrip("+").partition("=")
        if not override.startswith("+") or key in ours:
            continue
        siblings = [name for name in ours if name.rpartition(".")[0] == key.rpartition(".")[0]]
        nearest = difflib.get_close_matches(key, siblings, n=1, cutoff=SIMILARITY)
        if nearest:
            yield Problem(f"+{key}", value, "there is no such setting, so nothing would read it", f"Set {nearest[0]}")


def our_keys() -> Iterator[str]:
    """Yield the full name of every key that the overlay adds."""
    text = resources.files("verl_m2po.config").joinpath("overlay.yaml").read_text()
    yield from _names(OmegaConf.to_container(OmegaConf.create(text)), "")


def _names(node: object, prefix: str) -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _names(value, f"{prefix}{key}.")
