"""The lines of a ledger of trained rows, read in one way by everybody; `staleness/account/ledger.py` writes them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


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


def surviving(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The batches that the present weights were trained on: without the steps that a restart has thrown away."""
    batches: list[dict[str, Any]] = []
    for line in lines:
        if "resumed_from" in line:
            batches = [batch for batch in batches if batch["step"] <= line["resumed_from"]]
        else:
            batches.append(line)
    return batches
