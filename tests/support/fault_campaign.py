"""What `make faults` runs: faults that end a run, chains of kills that it heals, machines that join and leave.

    make faults SEEDS=1-12 KILLS=30

See `fault_seeds`, `kill_chain` and `machines`.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import kill_plan
import typer
from fault_runs import SEPARATE_MODES
from fault_seeds import Fault, run_all, write
from kill_chain import Chain
from machines import Visits
from rich.console import Console
from rich.table import Table


def parse_seeds(text: str) -> list[int]:
    """`1-12`, `3` or `1,4,9`."""
    parts = [part.split("-") for part in text.split(",")]
    return [seed for part in parts for seed in range(int(part[0]), int(part[-1]) + 1)]


def run_chains(seed: int, kills: int, out: Path, modes: Sequence[str], is_poisoned: bool) -> list[Chain]:
    """`kills` in one run of each of `modes`, none of which may end before its last step, and a prompt that kills."""
    chains = [Chain(out / f"chain_{mode}", mode, kill_plan.draw(mode, kills, seed)) for mode in modes]
    if is_poisoned:
        chains.append(Chain(out / "poisoned", "bounded_async", [], steps=POISONED_STEPS, poisoned=POISONED))
    for chain in chains:
        chain.run()
        records = [{"mode": chain.mode, "strike": asdict(strike)} for chain in chains for strike in chain.strikes]
        write(records, out / "chains.json")
    return chains


def table_of(faults: list[Fault]) -> Table:
    """One row per fault."""
    table = Table("seed", "run", "killed", "during", "after step", "ended after, s", "steps redone", "lost")
    table.add_column("first new step, s after the restart")
    for fault in faults:
        ended, recovered = ("-" if s is None else f"{s:.0f}" for s in (fault.ended_after_s, fault.recovered_after_s))
        ended = "went on" if fault.has_healed else ended
        lost = "nothing" if not fault.problems else "; ".join(fault.problems)[:300]
        cells = (fault.seed, fault.kind, fault.target, fault.moment, fault.killed_after_step, ended, fault.redone_steps)
        table.add_row(*map(str, cells), lost, recovered)
    return table


def table_of_chain(chain: Chain) -> Table:
    """One row per strike; seconds of generation are summed over the requests that lost them."""
    table = Table("run", "killed", "how", "during", "after step", "servers lost", "groups moved")
    for name in ("generation lost, s", "trainer waited, s"):
        table.add_column(name)
    for strike in chain.strikes:
        cells = (chain.mode, " and ".join(strike.targets) or "nothing", strike.pattern, strike.moment)
        counts = (strike.after_step, f"{strike.replicas_lost:.0f}", f"{strike.groups_moved:.0f}")
        table.add_row(*map(str, (*cells, *counts, strike.lost_generation_s, strike.trainer_waited_s)))
    return table


POISONED, POISONED_STEPS = 20, 14
"""Place of the prompt that kills in the data loader's order, in the third batch, and trainer steps of that run."""

CHAINED = ("stale_k", *SEPARATE_MODES)
"""Modes in which something is replaced."""


def main(
    seeds: Annotated[str, typer.Option(help="Faults: 1-12, or 1,4,9; empty: none")] = "1-12",
    out: Annotated[Path, typer.Option(help="Folder for logs, checkpoints and faults.json")] = Path("outputs/faults"),
    kills: Annotated[
        int, typer.Option(help="So many kills in one run, which heals, of each of the modes; 0: none")
    ] = 0,
    modes: Annotated[str, typer.Option(help="Of these runs, with commas between them")] = ",".join(CHAINED),
    chain_seed: Annotated[int, typer.Option(help="What the kills follow from")] = 1,
    poisoned: Annotated[bool, typer.Option(help="And one run with a prompt that kills its engines")] = False,
    visits: Annotated[bool, typer.Option(help="And one run that machines join, which are taken away again")] = False,
) -> None:
    """Kill processes of real training runs, restart them, and check that nothing was lost or trained twice."""
    out = out.resolve()
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty: a run in it would be resumed. Name another folder or remove it")
    out.mkdir(parents=True, exist_ok=True)
    console = Console(width=200)
    faults = run_all(parse_seeds(seeds), out) if seeds else []
    chains = run_chains(chain_seed, kills, out, modes.split(",") if kills else [], poisoned)
    visited = [Visits(out / "machines")] if visits else []
    for run in visited:
        run.run()
    if faults:
        console.print(table_of(faults))
    for chain in chains:
        console.print(table_of_chain(chain))
        console.print(f"{chain.folder.name}, seed {chain_seed}: {chain.problems or 'nothing lost'}")
    for run in visited:
        console.print(run.report())
    print(f"{out}")
    raise SystemExit(any(each.problems for each in (*faults, *chains, *visited)))


if __name__ == "__main__":
    typer.run(main)
