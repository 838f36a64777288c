"""Composes configs as verl's main does, without running anything."""

from collections.abc import Iterator
from contextlib import contextmanager

import verl  # noqa: F401  # loads the plugin, which adds our search path
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig


@contextmanager
def verl_hydra() -> Iterator[None]:
    """Hydra set up with verl's config package as the primary one."""
    GlobalHydra.instance().clear()
    with initialize_config_module("verl.trainer.config", version_base=None):
        yield


def composed(*overrides: str, config_name: str = "arithmetic") -> DictConfig:
    """Return the config that `overrides` give."""
    with verl_hydra():
        return compose(config_name, overrides=list(overrides))
