"""Asks questions about a config one after the other, so that none can silence the others by falling over."""

import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from verl_m2po.ground import verl_config
from verl_m2po.ground.problem import Problem, WrongValue

logger = logging.getLogger(__name__)


class Check(NamedTuple):
    """One question about a config.

    Args:
        name: What it asks, in a few words; for the message if it cannot answer.
        ask: Yields what is wrong. It may raise: that is a refusal too.
        about: The key that it is about, named where it fell over before it read one.
    """

    name: str
    ask: Callable[[DictConfig], Iterable[Problem]]
    about: str


def ask_all(checks: Iterable[Check], config: DictConfig) -> list[Problem]:
    """Everything that `checks` find wrong with `config`, each once; a check that raises is one fatal problem more.

    An error must not leave: Hydra turns one in a callback into a warning, and the run that should have been refused
    would start.
    """
    found: dict[tuple[str, str], Problem] = {}
    for check in checks:
        for problem in _answers(check, config):
            found.setdefault((problem.key, str(problem)), problem)
    return list(found.values())


def _answers(check: Check, config: DictConfig) -> list[Problem]:
    verl_config.forget_last_key()
    answers: list[Problem] = []
    try:
        # One by one: what was found before an error counts.
        for problem in check.ask(config):
            answers.append(problem)
    except WrongValue as wrong:
        answers.append(wrong.problem)
    except Exception as error:
        logger.debug("the check of %s could not answer", check.name, exc_info=True)
        answers.append(_unanswered(check, config, error))
    return answers


def _unanswered(check: Check, config: DictConfig, error: Exception) -> Problem:
    key = getattr(error, "full_key", None) or verl_config.last_key() or check.about
    reason = (str(error).splitlines() or [""])[0]
    why = f"the check of {check.name} cannot judge it ({type(error).__name__}: {reason})"
    return Problem(key, _value(config, key), why, "Correct its value")


def _value(config: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(config, key)
    except Exception as error:  # an interpolation that leads nowhere, for example: that is the value then
        return f"<{type(error).__name__}>"
