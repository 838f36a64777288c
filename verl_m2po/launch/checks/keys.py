"""Is a key on the command line a misspelling of one of ours?

Hydra refuses it and suggests a `+`, with which nothing would read it.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import read

SIMILARITY = 0.8


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield every key that was added on the command line beside one of ours with nearly the same name."""
    for override in read(config, "hydra.overrides.task", []):
        key, _, value = override.lstrip("+").partition("=")
        if override.startswith("+") and (meant := nearest(key)):
            yield Problem(f"+{key}", value, "there is no such setting, so nothing would read it", f"Set {meant}")


def hints(arguments: Iterable[str]) -> Iterator[str]:
    """Yield what to say of a command line whose misspelt keys Hydra will refuse without naming the right one.

    Args:
        arguments: Those of the command line; flags and what is no override are passed over.
    """
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if equals and not argument.startswith(("-", "+", "~")) and (meant := nearest(key)):
            yield f"There is no setting {key}. Did you mean {meant}?"


def nearest(key: str) -> str | None:
    """The setting of ours beside which `key` stands with nearly the same name; None if it is one, or there is none."""
    section, _, name = key.rpartition(".")
    siblings = [ours.rpartition(".")[2] for ours in our_keys() if ours.rpartition(".")[0] == section]
    # Not the whole keys: the longer the section, the more alike they would seem.
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=SIMILARITY)
    return f"{section}.{close[0]}" if close and name not in siblings else None


def our_keys() -> Iterator[str]:
    """Yield the full name of every key that the overlay adds."""
    # Not above: whoever asks for hints has often not imported verl's losses yet.
    from verl_m2po import overlay

    yield from _names(overlay.added_keys(), "")


def _names(node: object, prefix: str) -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _names(value, f"{prefix}{key}.")
