"""The runs of the study, the most telling ones first: stopped at any moment, what has run is worth reading."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

# verl's primary config of most runs
ARITHMETIC = "arithmetic_staleness"
# Seeds of the trials that chose the learning rate; none of them is reported as a result.
TRIAL_SEED = 101
SEEDS = (1, 2, 3, 4, 5)
# As few as have an interval
SWEEP_SEEDS = SEEDS[:3]
FEW_SEEDS = SEEDS[:2]
STALEST = 256
TRIAL_LEARNING_RATES = (1.5e-5, 3e-5, 6e-5)
TRIAL_STEPS = 250
# Of the claim: long enough that the batches of the base model, 65 at the largest staleness, are few.
CLAIM_STEPS = 1000
# Of what is compared with it.
STEPS = 300
# At half the study's learning rate GRPO clips as much on the stalest data as in the paper.
HALF_RATE, HALF_RATE_STAGE = 1.5e-5, "claim_half_rate"
# Five and ten times as large as the study's: far outside the paper's regime, where runs come apart.
HOT_LEARNING_RATES = (1.5e-4, 3e-4)
# At which other methods are tried too
HOT_RATE = max(HOT_LEARNING_RATES)
THRESHOLDS = (0.01, 0.02, 0.08, 0.16)
# Stages of the runs through verl: at the study's learning rate, and at `HOT_RATE`
VERL, VERL_HOT = "verl", "verl_hot"
# Stage of those whose time is compared
WALL_CLOCK = "wall_clock"
REPLAY_CLOCK = "replay_wall_clock"
THRESHOLD = "actor_rollout_ref.actor.policy_loss.m2po.threshold"
# One prompt with its responses decides for itself
MICRO_BATCH = (
    "actor_rollout_ref.actor.policy_loss.m2po.scope=micro_batch",
    "actor_rollout_ref.actor.use_dynamic_bsz=false",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
)
CAUSE_STALENESS = (64, 16, 0)
# What the claim is about: (loss, staleness in optimizer updates); on-policy training first.
CLAIM = (("grpo", 0), ("m2po", STALEST), ("grpo", STALEST), ("no_trust_region", STALEST))
# Compared at every age of `AGES`: the claim's methods, and what is better than M2PO
AGED = ("grpo", "m2po", "no_trust_region", "m2po_tapered")
AGES = (STALEST, 0, 64, 16)
# Every option of the Hydra group ``loss``, each as its preset has it
METHODS = tuple(sorted(Path(file.name).stem for file in (resources.files("verl_m2po.config") / "loss").iterdir()))


@dataclass(frozen=True)
class Job:
    """One run of the bench.

    Args:
        stage: What it is run for. A run that several stages want is made once: its folder does not depend on this.
        loss: Option of the Hydra group ``loss``.
        staleness_updates: Age of the data in optimizer updates; 0 is on-policy.
        seed: Seed of the order of the prompts and of the rollouts.
        overrides: Further Hydra overrides.
        variant: Part of the name, where the overrides differ between jobs.
        steps: Trainer steps. A longer run with the same overrides serves as well: what it did first is the same.
        replay: Option of the Hydra group ``replay``, with `staleness_updates` as its window; empty: no replay.
        config: verl's primary config, one of the bench's.
    """

    stage: str
    loss: str
    staleness_updates: int
    seed: int
    overrides: tuple[str, ...] = ()
    variant: str = ""
    steps: int = STEPS
    replay: str = ""
    config: str = ARITHMETIC

    @property
    def name(self) -> str:
        """Such as ``m2po-s256-seed1``, which `verl-m2po report` can read."""
        variant = f"-{self.variant}" if self.variant else ""
        return f"{self.loss}{variant}-s{self.staleness_updates}-seed{self.seed}"

    def folder(self, out: Path) -> Path:
        """Where it writes."""
        return out / self.config / self.name

    @property
    def all_overrides(self) -> list[str]:
        """All overrides of the run but its length."""
        return [
            f"loss={self.loss}",
            *self._staleness_overrides(),
            f"data.seed={self.seed}",
            f"actor_rollout_ref.rollout.seed={self.seed}",
            f"trainer.experiment_name={self.name}",
            "trainer.logger=[file]",
            *self.overrides,
        ]

    def _staleness_overrides(self) -> list[str]:
        if self.replay:
            window = f"trainer.v1.replay.staleness_updates={self.staleness_updates}"
            return ["staleness=replay", f"replay={self.replay}", window]
        if self.staleness_updates > STALEST:
            # Older than any preset
            age = f"trainer.v1.stale_k.staleness_updates={self.staleness_updates}"
            return [f"staleness=s{STALEST}", age]
        return [f"staleness=s{self.staleness_updates}" if self.staleness_updates else "staleness=on_policy"]


def trials() -> Iterator[Job]:
    """GRPO on stale data at several learning rates, of which one is chosen by its clip fraction."""
    for rate in TRIAL_LEARNING_RATES:
        overrides = (f"actor_rollout_ref.actor.optim.lr={rate}",)
        yield Job("learning_rate", "grpo", STALEST, TRIAL_SEED, overrides, f"lr{rate:g}", TRIAL_STEPS)


def _claim() -> Iterator[Job]:
    """Seed by seed, so that all conditions have equally many at any moment."""
    for seed in SEEDS:
        for loss, updates in CLAIM:
            yield Job("claim", loss, updates, seed, steps=CLAIM_STEPS)


def _ages(seed: int) -> Iterator[Job]:
    yield from (Job("staleness", loss, updates, seed) for updates in AGES for loss in AGED)


def _methods(seed: int) -> Iterator[Job]:
    yield from (Job("methods", loss, STALEST, seed) for loss in METHODS)


def _thresholds(seed: int) -> Iterator[Job]:
    for threshold in THRESHOLDS:
        override = f"{THRESHOLD}={threshold}"
        yield Job("threshold", "m2po", STALEST, seed, (override,), f"threshold{threshold:g}")


def _causes(seed: int) -> Iterator[Job]:
    """Why M2PO does not recover everything: what it masks, how it decides what, or the age of the data."""
    looser = (f"{THRESHOLD}=0.16",)
    yield Job("causes", "m2po", STALEST, seed, looser, "threshold0.16", CLAIM_STEPS)
    yield Job("causes", "m2po", STALEST, seed, MICRO_BATCH, "micro_batch", CLAIM_STEPS)
    for updates in CAUSE_STALENESS:
        yield Job("causes", "m2po", updates, seed, steps=CLAIM_STEPS)


def at_rate(stage: str, loss: str, updates: int, seed: int, rate: float, steps: int = STEPS) -> Job:
    """A run at the learning rate `rate`."""
    return Job(stage, loss, updates, seed, (f"actor_rollout_ref.actor.optim.lr={rate}",), f"lr{rate:g}", steps)


def _hot(seed: int) -> Iterator[Job]:
    for rate in HOT_LEARNING_RATES:
        for loss, updates in CLAIM:
            yield at_rate("hot", loss, updates, seed, rate)


def _half_rate(seed: int) -> Iterator[Job]:
    for loss in ("m2po", "grpo"):
        yield at_rate(HALF_RATE_STAGE, loss, STALEST, seed, HALF_RATE, CLAIM_STEPS)


def longest(jobs: Iterable[Job]) -> list[Job]:
    """Of jobs that several stages want the longest, whose beginning serves them all, where the first of them stood."""
    of_name: dict[tuple[str, str], Job] = {}
    for job in jobs:
        key = (job.config, job.name)
        of_name[key] = max(of_name.get(key, job), job, key=lambda job: job.steps)
    return list(of_name.values())


def once(jobs: Iterable[Job], of_the_claim: Callable[[Job], bool] = lambda job: False) -> list[Job]:
    """Every condition with its first seed only, but those `of_the_claim`: the whole picture, most of it without bands.

    Args:
        jobs: A queue, whose order stays.
        of_the_claim: Which jobs stay, whatever their seed.
    """
    first: dict[Job, int] = {}
    return [job for job in jobs if first.setdefault(replace(job, seed=0), job.seed) == job.seed or of_the_claim(job)]


def is_of_the_claim(job: Job) -> bool:
    """Whether `job` is one of those that the study's first picture shows."""
    return job.stage == "claim"


def jobs() -> list[Job]:
    """All runs on the bench by stage, in the order in which they are started; what two stages want is in both."""

    def of_seeds(stage: Callable[[int], Iterable[Job]], seeds: Iterable[int] = SWEEP_SEEDS) -> list[Job]:
        return [job for seed in seeds for job in stage(seed)]

    claims = [*_claim(), *of_seeds(_half_rate), *trials()]
    sweeps = [*of_seeds(_ages), *of_seeds(_hot), *of_seeds(_thresholds)]
    return [*claims, *sweeps, *of_seeds(_methods, FEW_SEEDS), *of_seeds(_causes)]
