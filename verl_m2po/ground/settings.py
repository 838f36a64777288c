"""What a single setting may be, as data: a number of some kind, or text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem, WrongValue
from verl_m2po.ground.verl_config import read


def check_number(value: Any, key: str, at_least: float = -math.inf, above: float = -math.inf, below: float = math.inf):
    """Raise unless `value` is a number that is >= `at_least`, > `above` and < `below` (inf is a number).

    Args:
        value: Of the setting.
        key: Full name of the setting.
        at_least: Smallest value that is allowed.
        above: Largest value that is too small.
        below: Smallest value that is too large; inf: none is.

    Raises:
        ValueError: It is something else.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if is_number and value >= at_least and value > above and (value < below or below == math.inf):
        return
    limits = [f">= {at_least:g}"] if at_least > -math.inf else []
    limits += [f"> {above:g}"] if above > -math.inf else []
    limits += [f"< {below:g}"] if below < math.inf else []
    raise ValueError(f"{key} must be a number{''.join(' ' + limit for limit in limits)}, got {value!r}.")


def check_whole_number(value: Any, key: str, at_least: int) -> None:
    """Raise a ValueError unless `value` of the setting `key`, its full name, is a whole number >= `at_least`."""
    check_number(value, key, at_least)
    if not isinstance(value, int):
        raise ValueError(f"{key} must be a whole number, got {value!r}.")


def check_choice(value: Any, choices: Sequence[str], key: str) -> None:
    """Raise a ValueError unless `value` of the setting `key`, its full name, is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}.")


def check_boolean(value: Any, key: str) -> None:
    """Raise a ValueError unless `value` of the setting `key`, its full name, is true or false.

    Hydra passes no, off and the like on as text, which is true.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {value!r}.")


@dataclass(frozen=True)
class Number:
    """A setting that is a number.

    Args:
        key: Full name of the setting.
        least: Smallest value that is allowed.
        most: Largest one.
        is_whole: Whether fractions are refused.
        may_be_null: Whether null is allowed.
        excludes_least: Whether `least` itself is refused.
        default: What a config without the key means.
        meaning: What it is, in one clause; for the message.
    """

    key: str
    least: float = -math.inf
    most: float = math.inf
    is_whole: bool = True
    may_be_null: bool = False
    excludes_least: bool = False
    default: Any = None
    meaning: str = ""

    def of(self, config: DictConfig) -> Any:
        """The number in `config`, None for an allowed null.

        Raises:
            WrongValue: it is something else.
        """
        value = read(config, self.key, self.default)
        if (problem := self.problem_of(value)) is not None:
            raise WrongValue(problem)
        return value

    def problem_of(self, value: Any) -> Problem | None:
        """Why `value` is refused; None if it is not."""
        if value is None and self.may_be_null:
            return None
        reason = self._reason(value)
        if reason is None:
            return None
        return Problem(self.key, value, f"{reason}{f'; it is {self.meaning}' if self.meaning else ''}", self.remedy)

    def _reason(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"{value!r} is no number"
        if not math.isfinite(value):
            return "it is not finite"
        if self.is_whole and not isinstance(value, int):
            return "it is not whole"
        if value < self.least or (self.excludes_least and value == self.least):
            return "it is too small"
        if value > self.most:
            return "it is too large"
        return None

    @property
    def remedy(self) -> str:
        """What may be set instead."""
        kind = "whole number" if self.is_whole else "number"
        lower = f"above {self.least:g}" if self.excludes_least else f"of at least {self.least:g}"
        if math.isfinite(self.least) and math.isfinite(self.most):
            bounds = (
                f" {lower} and at most {self.most:g}"
                if self.excludes_least
                else f" from {self.least:g} to {self.most:g}"
            )
        elif math.isfinite(self.least):
            bounds = f" {lower}"
        else:
            bounds = ""
        return f"Set it to a {kind}{bounds}{', or null' if self.may_be_null else ''}"


@dataclass(frozen=True)
class Text:
    """A setting that is text, a path or a name for example.

    Args:
        key: Full name of the setting.
        meaning: What it is, in one clause.
        may_be_null: Whether null is allowed.
        default: What a config without the key means.
    """

    key: str
    meaning: str
    may_be_null: bool = False
    default: str | None = None

    def of(self, config: DictConfig) -> Any:
        """The text in `config`, None for an allowed null.

        Raises:
            WrongValue: it is something else.
        """
        value = read(config, self.key, self.default)
        if (problem := self.problem_of(value)) is not None:
            raise WrongValue(problem)
        return value

    def problem_of(self, value: Any) -> Problem | None:
        """Why `value` is refused; None if it is not."""
        if isinstance(value, str) or (value is None and self.may_be_null):
            return None
        return Problem(self.key, value, f"it is no text; it is {self.meaning}", f"Set it to {self.meaning}")
