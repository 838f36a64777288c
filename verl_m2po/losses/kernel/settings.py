"""What the settings of all losses share: where they live, and how a wrong value is refused."""

import math
from typing import Any, TypeVar

from verl.base_config import BaseConfig
from verl.workers.config import ActorConfig

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
    if value not in choices:
        raise ValueError(f"{KEY}.{key} must be one of {', '.join(choices)}, got {value!r}.")


def check_number(value: Any, key: str, at_least: float = -math.inf, above: float = -math.inf, below: float = math.inf):
    """Raise unless `value` is a number that is >= `at_least`, > `above` and < `below` (inf is a number)."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if is_number and value >= at_least and value > above and (value < below or below == math.inf):
        return
    limits = [f">= {at_least:g}"] if at_least > -math.inf else []
    limits += [f"> {above:g}"] if above > -math.inf else []
    limits += [f"< {below:g}"] if below < math.inf else []
    raise ValueError(f"{KEY}.{key} must be a number{''.join(' ' + limit for limit in limits)}, got {value!r}.")


def check_positive_threshold(threshold: Any, key: str) -> None:
    """Raise unless `threshold` is a positive number or inf; `key` is the full name of the setting."""
    check_threshold(threshold, key)
    if threshold == 0:
        raise ValueError(
            f"{key}=0 would drop every trust-region token. Use a positive number (the paper: 0.04), or inf for none."
        )
