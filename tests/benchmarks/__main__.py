"""`python -m benchmarks`: measure, and write the table into docs/benchmarks.md."""

import sys
from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import typer
from pages import processor, replace_section
from rich.console import Console
from rich.progress import track

from benchmarks.batches import make_batch
from benchmarks.measure import CALLS_A_TURN, CONTESTANTS, Call, median, peak_tensors, seconds

SECTION = "losses"
TOKENS = [13 * 1024, 51 * 1024, 206 * 1024, 1024 * 1024]
MASKED = [0.0006, 0.01, 0.1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

console = Console()


def main(
    out: Annotated[Path | None, typer.Option(help="Markdown file whose marked section is replaced.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds that count, for the smallest size.", min=1)] = 51,
    device: Annotated[str, typer.Option(help="cpu (one thread) or cuda.")] = "cpu",
    tokens: Annotated[list[int] | None, typer.Option(help="Sizes, multiples of 1024. Repeat for several.")] = None,
) -> None:
    """Forward and backward of the losses, statistics included, side by side in one process."""
    torch.set_num_threads(1)
    lines = _header(device, rounds)
    cases = [(n, f, d) for n in tokens or TOKENS for f in MASKED for d in DTYPES]
    for size, masked_fraction, dtype in track(cases, "measuring", console=console):
        lines.append(_row(size, masked_fraction, dtype, device, rounds))
    table = "\n".join(lines)
    if out is None:
        console.print(table, markup=False, soft_wrap=True)
    else:
        replace_section(out, SECTION, table)
        console.print(f"written to {out}")


def _header(device: str, rounds: int) -> list[str]:
    on = torch.cuda.get_device_name() if device == "cuda" else f"one thread of {processor()}"
    names = ["tokens", "masked", "log-probs", *(contestant.name for contestant in CONTESTANTS)]
    return [
        f"`python -m benchmarks {' '.join(sys.argv[1:])}`, {date.today()}, {on}, torch {torch.__version__}, "
        f"seed 0. Median of {rounds} rounds of {CALLS_A_TURN} calls (fewer rounds for larger batches, at least 5) "
        "in milliseconds, of processor time on the CPU; in brackets times as much as `vanilla`, and peak memory in "
        "tensors of the size of the float32 log-probs, gradient and saved tensors included.",
        "",
        "| " + " | ".join(names) + " |",
        "|" + "---:|" * len(names),
    ]


def _row(tokens: int, masked_fraction: float, dtype: str, device: str, rounds: int) -> str:
    batch = make_batch(tokens, masked_fraction, DTYPES[dtype], device)
    entered = [contestant for contestant in CONTESTANTS if tokens <= contestant.most_tokens]
    calls = [Call(contestant, batch) for contestant in entered]
    # Larger batches scatter less and take longer.
    medians = [median(times) for times in seconds(calls, max(5, rounds * TOKENS[0] // tokens))]
    cells = {
        call.contestant.name: f"{taken * 1e3:.2f} ({taken / medians[0]:.2f}x, {peak_tensors(call):.1f})"
        for call, taken in zip(calls, medians, strict=True)
    }
    values = [cells.get(contestant.name, "") for contestant in CONTESTANTS]
    return "| " + " | ".join([f"{tokens:,}", f"{masked_fraction:.2%}", dtype, *values]) + " |"


if __name__ == "__main__":
    typer.run(main)
