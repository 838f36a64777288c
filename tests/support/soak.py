"""A long run, a kill every hundred trainer steps, and the memory of each of its processes.

    make soak

Memory is the proportional set size (PSS) of Linux: what several processes share counts once. Processes of a kind, the
rollout's engines for example, are one line: the mean over those that live.
"""

import csv
import threading
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Annotated

import cpu_run
import kill_plan
import matplotlib as mpl
import psutil
import typer
from fault_runs import title_of
from kill_chain import Chain
from matplotlib.figure import Figure

from verl_m2po.report.drawing.style import RC

EVERY_S = 20.0
SETTLED_AFTER_STEPS, WINDOW_STEPS = 200, 50
MOST_GROWTH = 0.1
"""Of the mean over the last steps above that after `SETTLED_AFTER_STEPS`."""

SAVED = ("trainer.save_freq=20",)
"""Nothing goes on from these checkpoints: they are there to be written."""

ALSO_CALLED = {"AgentLoopWorkerTQ": "StalenessAgentLoopWorker"}
"""Ray titles an actor after the class that a running method is inherited from."""

MIB = 2**20


def kind_of(title: str) -> str | None:
    """The kind of a process by its title; None for Ray's own and for what comes and goes."""
    name = title.removeprefix("ray::").split(".")[0].split(":")[0].split(" ")[0]
    if title.startswith("VLLM::"):
        return "VLLM engine"
    return name if title.startswith("ray::") and not name.startswith("IDLE") else None


class Sampler:
    """Writes the memory of the processes of a run into a file, until it is told to stop.

    Args:
        chain: the run.
        path: a CSV file: seconds, trainer step, kind of process, id, RSS and PSS in MiB.
    """

    def __init__(self, chain: Chain, path: Path) -> None:
        self._chain, self._path = chain, path
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        began_at = time.monotonic()
        with self._path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("seconds", "step", "kind", "pid", "rss_mib", "pss_mib"))
            while not self._is_over.wait(EVERY_S):
                attempt = getattr(self._chain, "attempt", None)
                if attempt is None:
                    continue
                seconds, step = round(time.monotonic() - began_at), attempt.last_step
                for process in cpu_run.marked(attempt.mark):
                    if (kind := kind_of(title_of(process))) is not None:
                        rows.writerows((seconds, step, kind, process.pid, *memory) for memory in _memory_mib(process))
                file.flush()


def _memory_mib(process: psutil.Process) -> list[tuple[float, float]]:
    """RSS and PSS; nothing of one that has just ended."""
    try:
        used = process.memory_full_info()
    except psutil.Error:
        return []
    return [(round(used.rss / MIB, 1), round(used.pss / MIB, 1))]


def by_kind(path: Path) -> dict[str, dict[int, float]]:
    """The mean PSS of a process of each kind, in MiB, by trainer step."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            kind = ALSO_CALLED.get(row["kind"], row["kind"])
            found[kind][int(row["step"])].append(float(row["pss_mib"]))
    return {kind: {step: fmean(values) for step, values in steps.items()} for kind, steps in found.items()}


def growth(steps: dict[int, float], last_step: int) -> float | None:
    """By which share the memory at the end is above that after the start; None for a kind that is not there in both."""
    first = [v for step, v in steps.items() if 0 <= step - SETTLED_AFTER_STEPS < WINDOW_STEPS]
    last = [value for step, value in steps.items() if step > last_step - WINDOW_STEPS]
    return fmean(last) / fmean(first) - 1 if first and last else None


def figure_of(kinds: dict[str, dict[int, float]], kills: list[int]) -> Figure:
    """A line for each kind of process, and a mark for each kill."""
    with mpl.rc_context(RC):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for kind, steps in sorted(kinds.items(), key=lambda each: -max(each[1].values())):
            axes.plot(sorted(steps), [steps[step] for step in sorted(steps)], label=kind, linewidth=1.2)
        for step in kills:
            axes.axvline(step, color="#D9D9D9", linewidth=0.8, zorder=0)
        axes.set(xlabel="trainer step", ylabel="PSS of a process, MiB", ylim=(0, None))
        axes.set_title("Memory of each kind of process; grey: something was killed")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return figure


def main(
    out: Annotated[Path, typer.Option(help="Folder for the run, memory.csv and memory.svg")] = Path("outputs/soak"),
    steps: Annotated[int, typer.Option(help="Trainer steps")] = 1500,
    every: Annotated[int, typer.Option(help="Trainer steps from one kill to the next")] = 100,
    mode: Annotated[str, typer.Option(help="Trainer mode")] = "bounded_async",
    seed: Annotated[int, typer.Option(help="What the kills follow from")] = 1,
) -> None:
    """Train for long under kills, and show that no process grows."""
    out = out.resolve()
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty: a run in it would be resumed. Name another folder or remove it")
    patterns = (kill_plan.ONE,)
    strikes = kill_plan.draw(mode, max(0, (steps - 1) // every), seed, patterns)
    chain = Chain(out, mode, strikes, steps=steps, every_steps=every, seconds_per_token=0.0, more=SAVED)
    with Sampler(chain, out / "memory.csv"):
        chain.run()
    kinds = by_kind(out / "memory.csv")
    figure_of(kinds, [strike.after_step for strike in strikes]).savefig(out / "memory.svg")
    grown = {kind: growth(values, steps) for kind, values in kinds.items()}
    for kind, share in sorted(grown.items()):
        print(f"{kind}: {'not there throughout' if share is None else f'{share:+.1%}'}")
    print(f"{mode}, seed {seed}: {chain.problems or 'nothing lost'}; {out}")
    raise SystemExit(bool(chain.problems) or any(share is not None and share > MOST_GROWTH for share in grown.values()))


if __name__ == "__main__":
    typer.run(main)
