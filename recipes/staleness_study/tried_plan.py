"""The runs of the stages `tried` and `tried_long`: can more be had from old data than with M2PO?"""

from collections.abc import Iterator

from staleness_study import long_plan, tried
from staleness_study.plan import ARITHMETIC, CLAIM_STEPS, STALEST, TRIAL_SEED, Job

# None of them is reported elsewhere: what is chosen here is measured on other seeds.
SEEDS = (TRIAL_SEED, TRIAL_SEED + 1)
# Stage and trainer steps of each task, by its primary config
TASKS = {ARITHMETIC: ("tried", CLAIM_STEPS), long_plan.CONFIG: ("tried_long", long_plan.STEPS)}
# What the changes are compared with: (loss, staleness in optimizer updates)
AROUND = (("m2po", STALEST), ("grpo", STALEST), ("grpo", 0), ("topr", STALEST))


def jobs(config: str) -> list[Job]:
    """All runs of a task, seed by seed: M2PO, each change to it, and what they stand between."""

    stage, steps = TASKS[config]

    def of_seed(seed: int) -> Iterator[Job]:
        for loss, updates in AROUND:
            yield Job(stage, loss, updates, seed, steps=steps, config=config)
        for change in tried.names():
            chosen = (f"algorithm.policy_loss={change}",)
            yield Job(stage, "m2po", STALEST, seed, chosen, change, steps, config=config)

    return [job for seed in SEEDS for job in of_seed(seed)]
