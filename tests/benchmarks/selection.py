"""`python -m benchmarks.selection`: the two ways to find the first token to go, once all are added, on a CPU alone."""

import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pages import processor, replace_section

from benchmarks.batches import make_batch
from verl_m2po.second_moment import TrustRegionSearch, trust_region_magnitude

SECTION = "selection"
TOKENS = 206 * 1024
MASKED = (0.01, 0.1)


def main(
    out: Annotated[Path | None, typer.Option(help="Markdown file whose marked section is replaced.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds that count.", min=1)] = 41,
) -> None:
    """Sorting the few that may go, against radix selection, which several ranks and accelerators need."""
    torch.set_num_threads(1)
    lines = [
        f"`python -m benchmarks.selection {' '.join(sys.argv[1:])}`, {date.today()}, one thread of {processor()}, "
        f"torch {torch.__version__}, seed 0, {TOKENS:,} tokens. "
        f"Median of {rounds} rounds in milliseconds of processor time.",
        "",
        "| masked | sorting | radix selection |",
        "|---:|---:|---:|",
        *(_row(share, rounds) for share in MASKED),
    ]
    if out is None:
        typer.echo("\n".join(lines))
    else:
        replace_section(out, SECTION, "\n".join(lines))


def _row(masked_fraction: float, rounds: int) -> str:
    batch = make_batch(TOKENS, masked_fraction, torch.float32, "cpu")
    search: Any = TrustRegionSearch(batch.threshold)
    search.add(trust_region_magnitude(batch.log_prob - batch.old_log_prob, batch.advantages, batch.response_mask))
    spent, largest = torch.stack(search._inside).sum(0), torch.stack(search._largest_inside).amax()
    sorting = _milliseconds(lambda: search._solve_by_sorting(spent, largest), rounds)
    radix = _milliseconds(lambda: search._first_dropped(spent, None), rounds)
    return f"| {masked_fraction:.0%} | {sorting:.2f} | {radix:.2f} |"


def _milliseconds(call: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times[1:])


if __name__ == "__main__":
    typer.run(main)
