"""The runs of the stage `long`: the same questions where a response has 60 to 120 tokens."""

from collections.abc import Iterable, Iterator

from staleness_study.plan import CLAIM, FEW_SEEDS, SEEDS, STALEST, SWEEP_SEEDS, TRIAL_SEED, Job

STAGE, TRIAL_STAGE = "long", "long_rate"
CONFIG = "column_addition_staleness"
STEPS = 200
# Of these the one is taken at which GRPO clips about 1% at the largest staleness, as in the paper.
TRIAL_LEARNING_RATES = (3e-6, 1e-5, 3e-5, 1e-4)
# What was better than M2PO on short responses, with as many seeds as the claim
BETTER = (("topr", STALEST), ("m2po_tapered", STALEST))
# Compared with the claim's own
RIVALS = ("gspo", "vespo", "ctpo", "drpo", "vcpo", "dppo", "decoupled_ppo")
# At the age between, with the claim's own methods, as many seeds as have an interval: the best of them are close
BETWEEN, CLOSE = 64, ("vespo",)
AGES = (STALEST, BETWEEN, 0)

Condition = tuple[str, int]
"""(loss, staleness in optimizer updates)."""


def job(condition: Condition, seed: int) -> Job:
    """The run of one condition."""
    loss, updates = condition
    return Job(STAGE, loss, updates, seed, steps=STEPS, config=CONFIG)


def trials() -> Iterator[Job]:
    """GRPO on the stalest data at several learning rates, with a seed that is not reported."""
    for rate in TRIAL_LEARNING_RATES:
        overrides = (f"actor_rollout_ref.actor.optim.lr={rate}",)
        yield Job(TRIAL_STAGE, "grpo", STALEST, TRIAL_SEED, overrides, f"lr{rate:g}", STEPS, config=CONFIG)


def jobs() -> list[Job]:
    """All runs: the claim with every seed, then its rivals, age by age, with fewer."""
    own = tuple(dict.fromkeys(loss for loss, _ in (*CLAIM, *BETTER)))
    rest = [(loss, updates) for updates in AGES for loss in (*own, *RIVALS)]
    between = [(loss, BETWEEN) for loss in (*own, *CLOSE)]

    def seeds_of(chosen: Iterable[Condition], seeds: Iterable[int]) -> Iterator[Job]:
        yield from (job(condition, seed) for seed in seeds for condition in chosen)

    claim = seeds_of((*CLAIM, *BETTER), SEEDS)
    return list(dict.fromkeys([*trials(), *claim, *seeds_of(rest, FEW_SEEDS), *seeds_of(between, SWEEP_SEEDS)]))
