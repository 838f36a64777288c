"""The lines of a ledger of trained rows, read in one way by everybody; `staleness/account/ledger.py` writes them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

LARGEST = 2**53
"""Of the numbers in a ledger: times in seconds since the epoch, steps, versions and tokens."""


class Lines(NamedTuple):
    """What a ledger holds.

    Args:
        whole: Its JSON objects, in order.
        torn: Numbers, from 1, of the lines that are none, such as one that a crash cut off.
    """

    whole: list[dict[str, Any]]
    torn: list[int]


def read(path: str | Path) -> Lines:
    """All lines of the ledger at `path`; nothing that stands in it is an error.

    Raises:
        OSError: the file cannot be read.
    """
    lines = Lines([], [])
    for number, text in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # no JSON, or no UTF-8
            line = None
        if isinstance(line, dict):
            lines.whole.append(line)
        else:
            lines.torn.append(number)
    return lines


def number(name: str, value: Any, is_whole: bool = False) -> Any:
    """`value`, which a line has in the field `name`.

    Raises:
        TypeError: it is no number, or none that a float holds exactly.
    """
    kinds = int if is_whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not abs(value) <= LARGEST:
        raise TypeError(f"{name} is {f'{value!r}':.60}; it must be a {'whole ' if is_whole else ''}number")
    return value


def times(batch: dict[str, Any]) -> list[tuple[float, float] | None]:
    """(began, ended) of each group of a batch, in seconds since the epoch; None where a restart has lost them.

    Raises:
        KeyError, TypeError, ValueError: it has no such times.
    """
    return [None if each is None else _moments(each) for each in batch["generated"]]


def _moments(pair: Any) -> tuple[float, float]:
    began, ended = pair
    return number("generated", began), number("generated", ended)


def surviving(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The batches that the present weights were trained on: without the steps that a restart has thrown away."""
    batches: list[dict[str, Any]] = []
    for line in lines:
        if "resumed_from" in line:
            batches = [batch for batch in batches if batch["step"] <= line["resumed_from"]]
        else:
            batches.append(line)
    return batches
