"""The runs of the stages `tried` and `tried_long`: can more be had from old data than with M2PO?"""

from collections.abc import Iterator
from dataclasses import replace

from staleness_study import long_plan, tried
from staleness_study.plan import ARITHMETIC, CLAIM_STEPS, HOT_RATE, STALEST, TRIAL_SEED, Job, at_rate

# None of them is reported elsewhere: what is chosen with them is measured on the seeds of the other results.
SEEDS = (TRIAL_SEED, TRIAL_SEED + 1)
# Stage and trainer steps of each task, by its primary config
TASKS = {ARITHMETIC: ("tried", CLAIM_STEPS), long_plan.CONFIG: ("tried_long", long_plan.STEPS)}
# The change that was worth it has become an option of the package
OPTION = "m2po_tapered"
# What the changes are compared with: (loss, staleness in optimizer updates)
AROUND = (("m2po", STALEST), ("grpo", STALEST), ("grpo", 0), ("topr", STALEST), (OPTION, STALEST))
# Do the changes still hold at ten times the learning rate? Of the short task
HOT_STAGE = "tried_hot"
HOT_AROUND = ("m2po", "topr", OPTION)


def jobs(config: str) -> list[Job]:
    """All runs of a task, seed by seed: M2PO, what it is compared with, and each change to it."""
    stage, steps = TASKS[config]

    def of_seed(seed: int) -> Iterator[Job]:
        for loss, updates in AROUND:
            yield Job(stage, loss, updates, seed, steps=steps, config=config)
        for change in tried.names():
            chosen = (f"algorithm.policy_loss={change}",)
            yield Job(stage, "m2po", STALEST, seed, chosen, change, steps, config=config)

    return [job for seed in SEEDS for job in of_seed(seed)] + (_hot() if config == ARITHMETIC else [])


def hot_variant(change: str) -> str:
    """Variant of the run with `change` at `HOT_RATE`; empty: M2PO itself, or another method."""
    return f"{change}-lr{HOT_RATE:g}" if change else f"lr{HOT_RATE:g}"


def _hot() -> list[Job]:
    def with_change(change: str, seed: int) -> Job:
        unchanged = at_rate(HOT_STAGE, "m2po", STALEST, seed, HOT_RATE)
        chosen = (*unchanged.overrides, f"algorithm.policy_loss={change}")
        return replace(unchanged, overrides=chosen, variant=hot_variant(change))

    around = [at_rate(HOT_STAGE, loss, STALEST, seed, HOT_RATE) for seed in SEEDS for loss in HOT_AROUND]
    return around + [with_change(change, seed) for seed in SEEDS for change in tried.names()]
