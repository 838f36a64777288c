"""`python -m benchmarks.plan_scale`: what it costs to simulate 10,000 devices with a million trajectories in flight."""

import resource
import time
from typing import Annotated

import typer
from pages import processor
from rich.console import Console

from verl_m2po.planner.setting import OFF, Setting
from verl_m2po.planner.simulate import simulate
from verl_m2po.planner.workload import EngineCurve, Generation, QuantileLengths, Training, Workload

# Nine batches of 13,892 groups of 8 are a million trajectories, and a quarter of a batch is a whole number of groups.
BOUND_STEPS, GROUPS, RESPONSES = 8, 13_892, 8
SERVERS, TRAINERS = 9_000, 1_000


def workload() -> Workload:
    """Responses with a tail, servers and trainers that differ, and a push that reads interrupted requests in again."""
    curve = EngineCurve(((1, 60.0), (32, 1500.0), (128, 3500.0), (256, 4500.0)), 256)
    return Workload(
        GROUPS,
        RESPONSES,
        QuantileLengths({0.5: 900, 0.9: 3000}, 8192),
        Generation(SERVERS, curve, prefill_tokens_per_s=30_000, speed_spread=0.05),
        Training(5.0, push_s=2.0, devices=TRAINERS, spread=0.03),
        prompt_tokens=200,
    )


def main(
    steps: Annotated[int, typer.Option(help="Trainer steps.", min=1)] = 50,
    replay: Annotated[str, typer.Option(help="Option of the group `replay`.")] = OFF,
) -> None:
    """Processor time and memory of one simulation, from an empty buffer."""
    began = time.process_time()
    outcome = simulate(Setting("bounded_async", BOUND_STEPS, replay=replay), workload(), steps=steps, warm_up=0)
    taken, peak_gib = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    Console().print(
        f"{steps} trainer steps of {SERVERS + TRAINERS} devices, {outcome.deepest * RESPONSES} trajectories in flight, "
        f"replay={replay}: {taken:.0f} s of processor time, {peak_gib:.2f} GiB ({processor()})",
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    typer.run(main)
