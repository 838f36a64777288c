"""The runs of the stage `long`: the same questions where a response has 60 to 120 tokens."""

from collections.abc import Iterable, Iterator, Mapping

from staleness_study import comparison_plan
from staleness_study.comparison_plan import ALTERNATIVES
from staleness_study.plan import CLAIM, FEW_SEEDS, SEEDS, STALEST, SWEEP_SEEDS, TRIAL_SEED, Job

STAGE, TRIAL_STAGE = "long", "long_rate"
CONFIG = "column_addition_staleness"
STEPS = 200
# Of these the one is taken at which GRPO clips about 1% at the largest staleness, as in the paper.
TRIAL_LEARNING_RATES = (3e-6, 1e-5, 3e-5, 1e-4)
# What was better than M2PO on short responses, with as many seeds as the claim
BETTER = (("topr", STALEST), ("m2po_tapered", STALEST))
OWN = tuple(dict.fromkeys(loss for loss, _ in (*CLAIM, *BETTER)))
# Compared with these
RIVALS = ("gspo", "vespo", "ctpo", "drpo", "vcpo", "dppo", "decoupled_ppo")
AGES = (STALEST, 64, 0)
# What the grid on short responses found better than the preset (`rivals.best_settings`): chosen there, on a
# seed that is not reported, and judged here
SETTINGS = {
    "grpo": "clip0.8_0.8",
    "gspo": "clip0.3_0.4",
    "vespo": "half",
    "ctpo": "bounds_x64",
    "drpo": "delta2.0",
    "vcpo": "base_share0.25",
    "decoupled_ppo": "clip0.4_0.4",
}
# The same grid here, method by method, and what it found better than the preset where it is whole: it need not be what
# is best on short responses. What leads with its preset has none.
GRID_STAGE = "long_grid"
GRID_OF = ("gspo", "m2po", "ctpo", "vespo", "grpo", "dppo", "decoupled_ppo", "drpo", "vcpo", "topr", "m2po_tapered")
SETTINGS_HERE = {
    "gspo": "clip0.003_0.004",
    "m2po": "threshold0.01",
    "ctpo": "bounds_x64",
    "vespo": "docstring",
    "grpo": "clip0.8_0.8",
    "decoupled_ppo": "clip0.1_0.1",
    "drpo": "delta0.5",
    "vcpo": "base_share0.5",
}

Condition = tuple[str, int]
"""(loss, staleness in optimizer updates)."""


def job(condition: Condition, seed: int, variant: str = "") -> Job:
    """The run of one condition, with its preset or with one of `ALTERNATIVES`."""
    loss, updates = condition
    overrides = ALTERNATIVES[loss][variant] if variant else ()
    return Job(STAGE, loss, updates, seed, overrides, variant, STEPS, config=CONFIG)


def trials() -> Iterator[Job]:
    """GRPO on the stalest data at several learning rates, with a seed that is not reported."""
    for rate in TRIAL_LEARNING_RATES:
        overrides = (f"actor_rollout_ref.actor.optim.lr={rate}",)
        yield Job(TRIAL_STAGE, "grpo", STALEST, TRIAL_SEED, overrides, f"lr{rate:g}", STEPS, config=CONFIG)


def grid() -> list[Job]:
    """Every setting of `GRID_OF`, with a seed that is not reported."""
    return comparison_plan.grid(GRID_OF, GRID_STAGE, STEPS, CONFIG)


def is_of_the_claim(job: Job) -> bool:
    """Whether `job` is of the claim, or of what is better than M2PO."""
    return job.stage == STAGE and (job.loss, job.staleness_updates) in (*CLAIM, *BETTER) and not job.variant


def jobs() -> list[Job]:
    """All runs: the claim with every seed, its rivals age by age with two, then what intervals take.

    Those are as many seeds as on short responses: five on the stalest data, three on younger data and of settings.
    """
    stalest, *younger = ([(loss, updates) for loss in (*OWN, *RIVALS)] for updates in AGES)

    def seeds_of(chosen: Iterable[Condition], seeds: Iterable[int]) -> Iterator[Job]:
        yield from (job(condition, seed) for seed in seeds for condition in chosen)

    def with_settings(settings: Mapping[str, str]) -> Iterator[Job]:
        yield from (job((loss, STALEST), seed, settings[loss]) for seed in SWEEP_SEEDS for loss in settings)

    queue = [*trials(), *seeds_of((*CLAIM, *BETTER), SEEDS)]
    queue += [run for conditions in (stalest, *younger) for run in seeds_of(conditions, FEW_SEEDS)]
    queue += seeds_of(stalest, SEEDS)
    queue += [*with_settings(SETTINGS), *with_settings(SETTINGS_HERE), *grid()]
    queue += [run for conditions in younger for run in seeds_of(conditions, SWEEP_SEEDS)]
    return list(dict.fromkeys(queue))
