"""Composes verl's configs as ``python -m verl.trainer.main_ppo`` does, in this process or in one without the plugin."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any

import verl  # noqa: F401  # loads the plugin
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, ListConfig, OmegaConf

from verl_m2po import overlay

MISSING = object()
ENTRY_POINT_CONFIGS = "verl.trainer.config"
OUR_CONFIGS = resources.files("verl_m2po.config")

_COMPOSE_ALL = """
import json, sys
import verl
from hydra import compose, initialize_config_dir, initialize_config_module
from omegaconf import OmegaConf
from parsed_once import parse_once

parse_once()
composed = []
for name, overrides, directory in json.load(sys.stdin):
    try:
        with (
            initialize_config_dir(directory, version_base=None)
            if directory
            else initialize_config_module("verl.trainer.config", version_base=None)
        ):
            composed.append(OmegaConf.to_container(compose(name, overrides=overrides)))
    except Exception as error:
        composed.append(f"{type(error).__name__}: {error}")
json.dump(composed, sys.stdout)
"""


@cache
def composed(config_name: str, *overrides: str) -> DictConfig:
    """The config of ``main_ppo --config-name=<config_name> <overrides>``, not resolved. Shared: do not change it."""
    with initialize_config_module(ENTRY_POINT_CONFIGS, version_base=None):
        return compose(config_name, overrides=list(overrides))


def all_composed(requests: list[tuple[str, list[str], str | None]], plugin: bool) -> list[dict | str]:
    """Compose every request in one fresh process, with or without the plugin; a string is an error.

    Args:
        requests: Config name, overrides, and the directory of `--config-path`; None: verl's own.
        plugin: Whether verl loads its plugins.
    """
    environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "auto" if plugin else "none"}
    process = subprocess.run(
        [sys.executable, "-c", _COMPOSE_ALL],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        env=environment,
        # Configs in verl's examples name verl's own by `file://verl/trainer/config`, from the root of a clone.
        cwd=resources.files("verl") / "..",
        timeout=1100,
    )
    assert process.returncode == 0, process.stderr
    # verl and what it imports may print; the answer is the last line.
    return json.loads(process.stdout.splitlines()[-1])


def leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) of `config`, interpolations as written; lists and empty mappings are leaves."""
    if isinstance(config, DictConfig | ListConfig):
        config = OmegaConf.to_container(config)
    if not isinstance(config, Mapping) or not config:
        yield path, config
        return
    for key, value in config.items():
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def select(config: Any, key: str) -> Any:
    """The value at the dotted `key` of `config` without resolving it; `MISSING` if there is none."""
    node = OmegaConf.to_container(config) if isinstance(config, DictConfig) else config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return MISSING
        node = node[part]
    return node


def options(group: str) -> list[str]:
    """The options of one of our groups."""
    return sorted(file.name.removesuffix(".yaml") for file in (OUR_CONFIGS / group).iterdir())


def primaries() -> list[str]:
    """Our primary configs."""
    names = [file.name for file in OUR_CONFIGS.iterdir() if file.name.endswith(".yaml")]
    return sorted(name.removesuffix(".yaml") for name in names)


def own_values(name: str) -> dict[str, Any]:
    """What the file of one of our configs sets itself, as dotted keys."""
    config = OmegaConf.create((OUR_CONFIGS / f"{name}.yaml").read_text())
    return {key: value for key, value in leaves(config) if not key.startswith(("hydra.", "defaults"))}


def option_values(group: str, option: str) -> dict[str, Any]:
    """What an option of one of our groups sets, as dotted keys."""
    config = OmegaConf.create((OUR_CONFIGS / group / f"{option}.yaml").read_text())
    bases = [entry for entry in config.get("defaults", []) if entry != "_self_"]
    inherited = [value for base in bases for value in option_values(group, base).items()]
    return dict(inherited) | own_values(f"{group}/{option}")


# The one value of verl's that the overlay replaces: its class is closed to new keys, ours is a subclass of it.
REPLACED = {"actor_rollout_ref.actor.policy_loss._target_"}
# Every key that the overlay adds.
ADDED = {key for key, _ in leaves(overlay.added_keys()) if not key.startswith("hydra.")} - REPLACED


def changes(before: dict, after: dict) -> set[str]:
    """Keys of `before` that are gone or different in `after`."""
    now = dict(leaves(after))
    return {key for key, value in leaves(before) if key not in now or now[key] != value}


def additions(before: dict, after: dict) -> set[str]:
    """Keys of `after` that are not in `before`."""
    return dict(leaves(after)).keys() - dict(leaves(before)).keys()
