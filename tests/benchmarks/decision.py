"""`python -m benchmarks.decision`: what the decision over a mini-batch costs, by tokens and ranks.

Real processes in a gloo group, one thread each. Every rank holds its share of the tokens; all find one threshold.
"""

import os
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from pages import processor, replace_section
from rich.console import Console
from torch.multiprocessing.spawn import spawn

from benchmarks.batches import make_batch
from verl_m2po.second_moment import TrustRegionSearch, trust_region_magnitude

SECTION = "decision"
RANKS = (1, 2, 4)
TOKENS = (52 * 1024, 208 * 1024, 1024 * 1024)
MASKED = 0.01


def main(
    out: Annotated[Path | None, typer.Option(help="Markdown file whose marked section is replaced.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds that count.", min=1)] = 15,
) -> None:
    """Milliseconds until all ranks know the threshold of a mini-batch."""
    lines = [
        f"`python -m benchmarks.decision --rounds {rounds}`, {date.today()}, {processor()}, torch "
        f"{torch.__version__}, gloo on one machine, one thread a rank, seed 0, {MASKED:.0%} to mask. Median of "
        f"{rounds} rounds in milliseconds, wall-clock, slowest rank.",
        "",
        "| tokens of the mini-batch | " + " | ".join(f"{ranks} rank{'s' * (ranks > 1)}" for ranks in RANKS) + " |",
        "|" + "---:|" * (len(RANKS) + 1),
    ]
    for tokens in TOKENS:
        cells = [f"{measure(ranks, tokens, rounds) * 1e3:.1f}" for ranks in RANKS]
        lines.append(f"| {tokens:,} | " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    if out is None:
        Console().print(table, markup=False, soft_wrap=True)
    else:
        replace_section(out, SECTION, table)


def measure(ranks: int, tokens: int, rounds: int) -> float:
    """Median seconds of a decision over `tokens` tokens that are spread over `ranks` processes."""
    with tempfile.TemporaryDirectory() as folder:
        queue = mp.get_context("spawn").SimpleQueue()
        spawn(_rank, (ranks, tokens, rounds, folder, queue), nprocs=ranks)
        times = [queue.get() for _ in range(ranks)]
    return statistics.median(max(by_rank) for by_rank in zip(*times, strict=True))


def _rank(rank: int, ranks: int, tokens: int, rounds: int, folder: str, queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    batch = make_batch(tokens // ranks, MASKED, torch.float32, "cpu")
    magnitude = trust_region_magnitude(batch.log_prob - batch.old_log_prob, batch.advantages, batch.response_mask)
    times = []
    for _ in range(rounds + 2):
        dist.barrier()
        start = time.perf_counter()
        search = TrustRegionSearch(batch.threshold)
        search.add(magnitude)
        search.solve(dist.group.WORLD if ranks > 1 else None)
        times.append(time.perf_counter() - start)
    queue.put(times[2:])
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
