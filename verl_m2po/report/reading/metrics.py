"""The metrics that the report looks at, by the names under which verl and this package log them.

Where several names are given, the first one that a run logged is shown.
"""

import re
from dataclasses import dataclass

import pandas as pd

# verl/trainer/ppo/v1/trainer_base.py `_val_metrics_update`; the source itself may contain slashes ("openai/gsm8k").
VALIDATION = re.compile(r"^val-core/(?P<source>.+)/(?P<variable>[^/]+)/mean@(?P<samples>\d+)$")
TRAINING_SCORE = "critic/score/mean"

MASKED_FRACTION = "actor/m2po/masked_fraction"
CLIP_FRACTION = "actor/pg_clipfrac"
SECOND_MOMENT_BEFORE = "actor/m2po/second_moment_before"
SECOND_MOMENT_AFTER = "actor/m2po/second_moment_after"
# Share of the tokens
EFFECTIVE_SAMPLE_SIZE = "actor/m2po/effective_sample_size"

# Share of the trained tokens by age in trainer steps: ".../steps_to_16" ends at 16, ".../steps_over_128" is the rest.
AGE_BUCKET = re.compile(r"^staleness/age_share/steps_(?P<kind>to|over)_(?P<end>\d+)$")
AGE_UPDATES = "staleness/age_updates_{}"
AGE_VERSIONS = "training/off_policy/trajectory_staleness/{}"
# Counted from the oldest weights that a trajectory was generated with, not from the freshest.
WORST_AGE_VERSIONS = "training/off_policy/trajectory_staleness_worst/{}"

AGES = (AGE_UPDATES, AGE_VERSIONS, WORST_AGE_VERSIONS)
# In versions, updates or steps: far beyond any run's, and as many rows of a heat map as fit into memory.
LARGEST_AGE = 10_000

STEP_SECONDS = ("timing_s/step", "perf/time_per_step")
THROUGHPUT = "perf/throughput"
# Inside `timing_s/step`, in the order in which a step runs them; verl validates outside of it.
PHASES = (
    "gen",
    "reward",
    "old_log_prob",
    "ref",
    "values",
    "adv",
    "update_critic",
    "update_actor",
    "update_weights",
    "save_checkpoint",
)
OUTSIDE_STEP = ("testing",)


@dataclass(frozen=True)
class Panel:
    """One small plot: a question, and the metrics that answer it.

    Args:
        title: What is shown, with its unit.
        metrics: Names, best first.
        log: Whether the vertical axis is logarithmic.
    """

    title: str
    metrics: tuple[str, ...]
    log: bool = False


HEALTH = (
    Panel("training score", (TRAINING_SCORE,)),
    Panel("entropy (nats per token)", ("actor/entropy", "actor/m2po/entropy_kept")),
    Panel("gradient norm", ("actor/grad_norm",), log=True),
    Panel(
        "largest importance ratio",
        ("rollout_corr/rollout_is_max",),
        log=True,
    ),
    Panel("effective sample size (share)", (EFFECTIVE_SAMPLE_SIZE, "rollout_corr/rollout_is_eff_sample_size")),
    Panel("largest |log ratio| kept", ("actor/m2po/threshold_log_ratio",)),
    Panel("KL, behaviour to current (nats)", ("actor/m2po/kl", "actor/ppo_kl")),
    Panel("response length (tokens)", ("response_length/mean",)),
    Panel("responses of full length (share)", ("response_length/clip_ratio",)),
    Panel("rollout to trainer mismatch (probability)", ("training/rollout_probs_diff_mean",), log=True),
)

BUFFER = (
    Panel("depth (prompt groups held)", ("staleness/depth",)),
    Panel("waiting (finished prompt groups)", ("staleness/waiting",)),
    Panel("bound (optimizer updates)", ("staleness/bound_updates",)),
    Panel("load of the trust region (share of its target)", ("staleness/bound_load",)),
    Panel("admitted (prompt groups per step)", ("staleness/admitted",)),
    Panel("evicted (prompt groups per step)", ("staleness/evicted", "training/off_policy/evicted_samples")),
    Panel("trainer idle (s per step)", ("staleness/trainer_idle_s",)),
    Panel("generator idle (s per step)", ("staleness/generator_idle_s",)),
)


def plausible_age(age: pd.Series) -> pd.Series:
    """Which ages are within `LARGEST_AGE`; NaN is."""
    return ~(age.abs() > LARGEST_AGE)


def first_logged(logged: set[str], names: tuple[str, ...]) -> str | None:
    """The first of `names` that is in `logged`, or None."""
    return next((name for name in names if name in logged), None)


def validation_metrics(logged: set[str]) -> dict[str, str]:
    """Map a task, as "source/variable", to the validation metric of a run; of several mean@k the largest k."""
    found: dict[str, tuple[int, str]] = {}
    for name in logged:
        match = VALIDATION.match(name)
        if match:
            task = f"{match['source']}/{match['variable']}"
            found[task] = max(found.get(task, (0, "")), (int(match["samples"]), name))
    return {task: name for task, (_, name) in sorted(found.items())}
