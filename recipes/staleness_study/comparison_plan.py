"""The comparison of M2PO with its rivals on equal data: as published, at the best of a grid, and where it is hard."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from staleness_study.plan import (
    ARITHMETIC,
    CLAIM_STEPS,
    FEW_SEEDS,
    HOT_RATE,
    STALEST,
    STEPS,
    SWEEP_SEEDS,
    TRIAL_SEED,
    Job,
    at_rate,
)
from staleness_study.plan import SEEDS as REPORTED

GRID, STAGE, HOT_STAGE, AGES_STAGE = "grid", "comparison", "comparison_hot", "comparison_ages"
# Four times as old as the paper's, for the best `AT_OLDEST` methods
OLDEST, AT_OLDEST = 1024, 8
# What these are tried with there beside their presets: four times the budget on data four times as old
OLDEST_SETTINGS = {"m2po": "threshold0.16", "m2po_tapered": "threshold0.16"}
# Over as many trainer steps on-policy: what is to be reached, and do those that are as good help on fresh data too?
ON_POLICY = ("grpo", "m2po", "no_trust_region", "topr", "m2po_tapered")
# Compared over fewer trainer steps, with the beginning of the runs on the stalest data
YOUNGER = (64, 0)
_ACTOR = "actor_rollout_ref.actor"
_LOSS = f"{_ACTOR}.policy_loss"


def _clips(*bounds: tuple[float, float]) -> dict[str, tuple[str, ...]]:
    """Below and above a ratio of 1."""
    return {
        f"clip{low:g}_{high:g}": (f"{_ACTOR}.clip_ratio_low={low}", f"{_ACTOR}.clip_ratio_high={high}")
        for low, high in bounds
    }


def _one(key: str, *values: float | str) -> dict[str, tuple[str, ...]]:
    return {f"{key.rpartition('.')[2]}{value}": (f"{_LOSS}.{key}={value}",) for value in values}


def _vespo(k_positive: float, lambda_positive: float, k_negative: float, lambda_negative: float) -> tuple[str, ...]:
    values = {
        "k_positive": k_positive,
        "lambda_positive": lambda_positive,
        "k_negative": k_negative,
        "lambda_negative": lambda_negative,
    }
    return tuple(f"{_LOSS}.vespo.{name}={value}" for name, value in values.items())


def _ctpo(factor: int) -> tuple[str, ...]:
    bounds = {"clip_low": 0.025, "clip_high": 0.05, "dual_clip": 0.05}
    return tuple(f"{_LOSS}.ctpo.{name}={factor * value:g}" for name, value in bounds.items())


# Settings beside those of the preset, three of each method that has any: what decides how far a policy may move.
ALTERNATIVES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "m2po": _one("m2po.threshold", 0.01, 0.16, 0.64),
    "m2po_tapered": _one("m2po.threshold", 0.01, 0.16, 0.64),
    "grpo": _clips((0.1, 0.1), (0.4, 0.4), (0.8, 0.8)),
    "no_trust_region": {},
    "topr": _one("topr.level", "token", "geometric"),
    "gspo": _clips((3e-3, 4e-3), (3e-2, 4e-2), (3e-1, 4e-1)),
    "vespo": {
        # Those of the docstring of its code, then half and twice the defaults
        "docstring": _vespo(2.0, 1.5, 4.0, 2.5),
        "half": _vespo(1.0, 1.5, 1.5, 1.0),
        "twice": _vespo(4.0, 6.0, 6.0, 4.0),
    },
    "ctpo": {f"bounds_x{factor}": _ctpo(factor) for factor in (4, 16, 64)},
    "drpo": _one("drpo.delta", 0.15, 0.5, 2.0),
    "vcpo": _one("step_scale.base_share", 0.25, 0.5) | _one("step_scale.power", 1.0),
    "dppo": _clips((0.05, 0.05), (0.3, 0.3), (0.6, 0.6)),
    "decoupled_ppo": _clips((0.1, 0.1), (0.4, 0.4), (0.8, 0.8)),
    "ppo_ewma": _one("ppo_ewma.decay", 0.5, 0.97, 0.99),
}


def grid(
    losses: Iterable[str] = tuple(ALTERNATIVES), stage: str = GRID, steps: int = STEPS, config: str = ARITHMETIC
) -> list[Job]:
    """Every setting of each of `losses` on the stalest data, with a seed that is not reported."""

    def of_method(loss: str) -> Iterator[Job]:
        yield Job(stage, loss, STALEST, TRIAL_SEED, steps=steps, config=config)
        for variant, overrides in ALTERNATIVES[loss].items():
            yield Job(stage, loss, STALEST, TRIAL_SEED, overrides, variant, steps, config=config)

    return [job for loss in losses for job in of_method(loss)]


def jobs(chosen: Mapping[str, str], best: Sequence[str] = ()) -> list[Job]:
    """The comparison, the stalest data of all seeds first, then what is asked beyond it.

    Args:
        chosen: By method: the setting that the grid found best, a key of `ALTERNATIVES`; empty: the preset's, which is
            run anyway. A method that is missing has no runs of its own choice yet.
        best: Methods that are to learn from data `OLDEST` updates old; none before they are known.
    """

    def as_published(seed: int) -> Iterator[Job]:
        yield from (Job(STAGE, loss, STALEST, seed, steps=CLAIM_STEPS) for loss in ALTERNATIVES)

    def at_chosen(seed: int) -> Iterator[Job]:
        for loss, variant in chosen.items():
            if variant:
                yield Job(STAGE, loss, STALEST, seed, ALTERNATIVES[loss][variant], variant, CLAIM_STEPS)

    def on_policy(seed: int) -> Iterator[Job]:
        yield from (Job(STAGE, loss, 0, seed, steps=CLAIM_STEPS) for loss in ON_POLICY)

    def oldest(seed: int) -> Iterator[Job]:
        yield from (Job(STAGE, loss, OLDEST, seed, steps=CLAIM_STEPS) for loss in best)
        for loss, variant in OLDEST_SETTINGS.items():
            if loss in best:
                yield Job(STAGE, loss, OLDEST, seed, ALTERNATIVES[loss][variant], variant, CLAIM_STEPS)

    queue = [job for seed in REPORTED for job in (*on_policy(seed), *as_published(seed), *at_chosen(seed))]
    queue += [at_rate(HOT_STAGE, loss, STALEST, seed, HOT_RATE) for seed in SWEEP_SEEDS for loss in ALTERNATIVES]
    queue += [job for seed in FEW_SEEDS for job in oldest(seed)]
    queue += [Job(AGES_STAGE, loss, age, seed) for seed in SWEEP_SEEDS for age in YOUNGER for loss in ALTERNATIVES]
    return list(dict.fromkeys(queue))
