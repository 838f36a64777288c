"""The runs of the stage `prosperity`: does training without a trust region prosper before it collapses?"""

from collections.abc import Iterator

from staleness_study import long_plan
from staleness_study.plan import CLAIM, SEEDS, STALEST, THRESHOLD, THRESHOLDS, TRIAL_SEED, Job

STAGE, TRIAL_STAGE = "prosperity", "prosperity_rate"
CONFIG, STEPS = long_plan.CONFIG, 200
# At which it was looked for, with no trust region on the stalest data
TRIAL_LEARNING_RATES = (1e-4, 1.5e-4, 2e-4, 3e-4)
# Of these the smallest at which it collapses
RATE = 1.5e-4
VARIANT = f"lr{RATE:g}"
REPORTED = SEEDS[:3]
# The rise and the fall take a few tens of trainer steps.
VALIDATE_EVERY = 5
# The claim, and what is better on long responses
CONDITIONS = (*CLAIM, *long_plan.BETTER)
# At smaller rates the rise lasts longer: (loss, rate, trainer steps) at which a fall was looked for, and what was taken
LATER_STAGE, LATER_TRIAL_STAGE = "prosperity_later", "prosperity_later_rate"
LATER_TRIALS = (
    *(("no_trust_region", 7e-5, 1000), ("grpo", 7e-5, 1000)),
    *(("no_trust_region", 1e-4, 500), ("no_trust_region", 1.2e-4, 400)),
)
LATER_RATE, LATER_STEPS = 1e-4, 500
LATER_CONDITIONS = (*CLAIM, ("m2po_tapered", STALEST))
LATER_VALIDATE_EVERY = 10


def trials() -> Iterator[Job]:
    """No trust region at several learning rates, with a seed that is not reported."""
    for rate in TRIAL_LEARNING_RATES:
        overrides = (f"actor_rollout_ref.actor.optim.lr={rate}",)
        yield Job(TRIAL_STAGE, "no_trust_region", STALEST, TRIAL_SEED, overrides, f"lr{rate:g}", STEPS, config=CONFIG)


def later(stage: str, loss: str, updates: int, seed: int, rate: float = LATER_RATE, steps: int = LATER_STEPS) -> Job:
    """A run at a smaller learning rate over more trainer steps."""
    at_rate = (f"actor_rollout_ref.actor.optim.lr={rate}", f"trainer.test_freq={LATER_VALIDATE_EVERY}")
    return Job(stage, loss, updates, seed, at_rate, f"lr{rate:g}-steps{steps}", steps, config=CONFIG)


def later_trials() -> Iterator[Job]:
    """As `trials`, at smaller rates over more trainer steps."""
    for loss, rate, steps in LATER_TRIALS:
        yield later(LATER_TRIAL_STAGE, loss, STALEST, TRIAL_SEED, rate, steps)


def jobs() -> list[Job]:
    """All runs: the trials, each condition with every seed, and other trust regions of M2PO's with the first.

    Then the same at a smaller rate, over more trainer steps.
    """
    at_rate = (f"actor_rollout_ref.actor.optim.lr={RATE}", f"trainer.test_freq={VALIDATE_EVERY}")

    def job(loss: str, updates: int, seed: int, threshold: float | None = None) -> Job:
        tighter = () if threshold is None else (f"{THRESHOLD}={threshold}",)
        variant = VARIANT + ("" if threshold is None else f"-threshold{threshold:g}")
        return Job(STAGE, loss, updates, seed, (*at_rate, *tighter), variant, STEPS, config=CONFIG)

    compared = [job(loss, updates, seed) for seed in REPORTED for loss, updates in CONDITIONS]
    first = REPORTED[0]
    others = [job("m2po", STALEST, first, min(THRESHOLDS)), job("m2po_clip", STALEST, first)]
    compared_later = [later(LATER_STAGE, *condition, seed) for seed in REPORTED for condition in LATER_CONDITIONS]
    return [*trials(), *compared, *others, *later_trials(), *compared_later]
