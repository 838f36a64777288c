"""The table, for the terminal and as Markdown."""

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group as RenderGroup
from rich.table import Table
from rich.text import Text

from verl_m2po.report.reading.summary import Spread, Summary

RESULT = ("seeds", "steps", "start", "final", "best")


def _share(spread: Spread | None) -> str:
    """Results with three digits: accuracies and rewards."""
    if spread is None:
        return "-"
    return f"{spread.mean:.3f}±{spread.deviation:.3f}" if spread.count > 1 else f"{spread.mean:.3f}"


def _percent(spread: Spread | None) -> str:
    """Two digits that count, never with an exponent."""
    if spread is None:
        return "-"
    digits = np.format_float_positional(100 * spread.mean, precision=2, unique=False, fractional=False, trim="-")
    return f"{digits}%"


def _whole(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.mean:,.0f}"


def _some(spread: Spread | None, count: int, seeds: int) -> str:
    """A mean over those seeds for which it exists, and how many those are."""
    if spread is None:
        return "-"
    return _whole(spread) if count == seeds else f"{_whole(spread)} ({count}/{seeds})"


def cells(summary: Summary, with_task: bool, target: float | None) -> dict[str, str]:
    """Column title to text of one row."""
    row = {"run": summary.label}
    if with_task:
        row["task"] = summary.task
    row |= {
        "seeds": str(summary.seeds),
        "steps": f"{summary.steps:,}",
        "start": _share(summary.start),
        "final": _share(summary.final),
        "best": _share(summary.best),
        "best at": _whole(summary.best_step),
    }
    if target is not None:
        row[f"steps to {target:g}"] = _some(summary.steps_to_target, summary.reached, summary.seeds)
        row[f"seconds to {target:g}"] = _some(summary.seconds_to_target, summary.reached, summary.seeds)
    return row | {
        "collapse step": _some(summary.collapse_step, summary.collapsed, summary.seeds),
        "clipped or masked": _percent(summary.left_out),
        "tokens/s per device": _whole(summary.tokens_per_second),
    }


def rows(summaries: list[Summary], target: float | None = None) -> list[dict[str, str]]:
    """All rows; the task has a column only where there are several."""
    with_task = len({summary.task for summary in summaries}) > 1
    return [cells(summary, with_task, target) for summary in summaries]


def terminal(summaries: list[Summary], target: float | None = None) -> RenderGroup:
    """The table for rich, in two halves so that each fits 80 columns; names are never read as markup."""
    shown = rows(summaries, target)
    titles = list(shown[0]) if shown else []
    names = [title for title in titles if title in ("run", "task")]
    result = [title for title in titles if title in RESULT]
    cost = [title for title in titles if title not in (*names, *result)]
    return RenderGroup(*(_half(shown, names + half) for half in (result, cost) if half))


def _half(shown: list[dict[str, str]], titles: list[str]) -> Table:
    """Names fold where the terminal is narrow; numbers never do, and of titles no word."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in titles:
        if title in ("run", "task"):
            table.add_column(title, overflow="fold")
        else:
            widest = max(len(text) for text in (*title.split(), *(row[title] for row in shown)))
            table.add_column(title, justify="right", min_width=widest)
    for row in shown:
        table.add_row(*(Text(row[title]) for title in titles))
    return table


def _markdown_text(text: str) -> str:
    """Text that Markdown shows as it stands, in one cell of one line."""
    flat = "".join(c if c.isprintable() else " " for c in text)
    for character in "\\`*_[]|<>&#":
        flat = flat.replace(character, f"\\{character}") if character not in "<>&" else flat
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown(summaries: list[Summary], target: float | None = None, problems: list[str] | None = None) -> str:
    """The table as Markdown, then a line for each thing that is missing."""
    shown = rows(summaries, target)
    lines = ["Mean ± standard deviation over seeds.", ""] if shown else ["Nothing to show.", ""]
    if shown:
        titles = list(shown[0])
        lines.append("| " + " | ".join(titles) + " |")
        lines.append("| --- " + "| ---: " * (len(titles) - 1) + "|")
        lines += ["| " + " | ".join(_markdown_text(cell) for cell in row.values()) + " |" for row in shown]
    if problems:
        lines += ["", "Not there:", "", *(f"- {_markdown_text(problem)}" for problem in problems)]
    return "\n".join(lines) + "\n"
