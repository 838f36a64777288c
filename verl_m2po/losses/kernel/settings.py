"""What the settings of all losses share: where they live, and how a wrong value is refused."""

import math
from typing import Any, TypeVar

from verl.base_config import BaseConfig
from verl.workers.config import ActorConfig

from verl_m2po.ground import settings as ground
from verl_m2po.second_moment import check_threshold

KEY = "actor_rollout_ref.actor.policy_loss"

Settings = TypeVar("Settings", bound=BaseConfig)


def settings_of(config: ActorConfig | None, name: str, settings_class: type[Settings]) -> Settings:
    """The sub-key `name` of verl's policy loss settings, its defaults where verl's own class is in use."""
    assert config is not None, "config must be verl's ActorConfig."
    settings = config.policy_loss.get(name, None)
    # Not `or`: verl's configs are mappings, whose truth is a count of their fields.
    return settings_class() if settings is None else settings


def check_choice(value: Any, choices: tuple[str, ...], key: str) -> None:
    """Raise unless `value` is one of `choices`; `key` is relative to the policy loss settings."""
    ground.check_choice(value, choices, f"{KEY}.{key}")


def check_boolean(value: Any, key: str) -> None:
    """Raise unless `value` is true or false; `key` is relative to the policy loss settings."""
    ground.check_boolean(value, f"{KEY}.{key}")


def check_number(value: Any, key: str, at_least: float = -math.inf, above: float = -math.inf, below: float = math.inf):
    """As `ground.settings.check_number`; `key` is relative to the policy loss settings."""
    ground.check_number(value, f"{KEY}.{key}", at_least, above, below)


def check_positive_threshold(threshold: Any, key: str) -> None:
    """Raise unless `threshold` is a positive number or inf; `key` is the full name of the setting."""
    check_threshold(threshold, key)
    if threshold == 0:
        raise ValueError(
            f"{key}=0 would drop every trust-region token. Use a positive number (the paper: 0.04), or inf for none."
        )
