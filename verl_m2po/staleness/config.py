"""The settings of the trainer modes, each under `trainer.v1.<mode>`, and their defaults.

`verl_m2po.overlay` adds them to verl's own configuration; a configuration without it gets them when the mode starts.
What is not listed here cannot be set: an unknown key is refused by name.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_m2po.ground.problem import Problem, WrongValue
from verl_m2po.ground.verl_config import TRAINER_MODE, read
from verl_m2po.staleness.rule.units import StalenessUnitsError, UpdateClock

AHEAD_STEPS = 8
"""Trainer steps that generation runs ahead where rollouts are trained again: verl's own bound of eight versions."""

AHEAD = "trainer.v1.bounded_async.ahead_updates"

ON_FAILED_TRAJECTORY = ("refill", "mask")


@dataclass
class StaleKConfig:
    """Exactly `staleness_updates` optimizer updates old, trainer and rollout on the same devices.

    Args:
        staleness_updates: age of every trained batch when its first update is made, in optimizer updates. 0 is
            on-policy. Must be a whole number of trainer steps, see docs/staleness.md.
        generation_timeout_s: wall-clock seconds for one trajectory; after that it failed. null waits for ever.
        on_failed_trajectory: `refill` replaces a group one of whose trajectories failed by another prompt; `mask` keeps
            it if one succeeded, and the failed ones are not trained on; see docs/reliability.md.
        max_failed_fraction: the run stops when more than this share of the last `failed_window_groups` prompt groups
            failed; one with masked trajectories counts as their share of it. 1 never stops.
        failed_window_groups: number of prompt groups over which `max_failed_fraction` is judged; nothing is judged
            before that many have ended.
        buffer_memory_limit_gib: refuse to start if the waiting rollouts could need more than this, in GiB. null takes
            half of the machine's memory. TransferQueue can spill to disk; the error says how.
        stop_wait_s: wall-clock seconds for which a run that was asked to end (Ctrl-C, SIGTERM) still waits for rollouts
            in flight. null waits as long as they take.
        start_timeout_s: wall-clock seconds for all processes of the run to start and to load the model; after that the
            run ends with an error that says who does not answer. null waits for ever.
        push_timeout_s: wall-clock seconds for one push of the weights to the rollout; after that the run ends. null
            waits for ever.
        no_progress_timeout_s: wall-clock seconds in which no group ends, none is trained and no weights are pushed,
            while nothing is validated or saved; after that the run ends with an error that says who waits for whom.
            null waits for ever.
        restarts: how often the command goes on by itself after an error, from the last checkpoint and the journal. 0
            ends with the error. After two restarts at the same trainer step the next error ends the run, whatever is
            left; so does Ctrl-C.
        journal: append what is dispatched and generated to a journal on disk, so that a crash loses what is being
            generated at that moment and not the rollouts since the last checkpoint. false writes none.
        journal_path: folder of the journal, on a filesystem that all nodes share. null: `journal` beside the
            checkpoints.
        journal_fsync: wait for the disk after each group. false: the journal outlives a crash of any process, not of
            the machine.
        prefetch: unpack the next batch, as far as it is known, while the present one trains. It takes the memory of a
            second unpacked batch, and changes nothing of what is trained. false unpacks a batch when it is needed.
        ledger_path: file to which every trained row is appended, with its weight versions, as JSON lines. null: none.
        parameter_sync_step: mini-batches between two weight syncs; the mode sets it. verl reads it under the name of
            the mode.
    """

    staleness_updates: int = 0
    generation_timeout_s: float | None = 3600.0
    on_failed_trajectory: str = "refill"
    max_failed_fraction: float = 0.2
    failed_window_groups: int = 100
    buffer_memory_limit_gib: float | None = None
    stop_wait_s: float | None = 10.0
    start_timeout_s: float | None = 3600.0
    push_timeout_s: float | None = 600.0
    no_progress_timeout_s: float | None = 7200.0
    restarts: int = 0
    journal: bool = False
    journal_path: str | None = None
    journal_fsync: bool = False
    prefetch: bool = True
    ledger_path: str | None = None
    parameter_sync_step: int = 1


@dataclass
class SeparateConfig(StaleKConfig):
    """What the modes on separate devices share.

    Args:
        served_within_nats: after the first push of trained weights the rollout gives the probabilities of some trained
            tokens again, and the run ends if their logarithms differ from the trainer's by more than this on average,
            in nats. null does not ask. Only vLLM is asked.
        heal: where a rollout server dies, its work moves to the others, and a new one is started in its place; see
            docs/reliability.md. false ends the run with an error.
        replica_timeout_s: wall-clock seconds after which a server that died and could not be replaced is given up, and
            the run goes on with the others. null tries for ever.
        max_replicas: where Ray reports free devices, rollout servers are added up to this number; see
            docs/reliability.md. At least as many as the run starts with. null adds none.
        keep_pushed_weights: keep, in host memory, the weights that the rollout holds while the actor is trained, so
            that a server can join at any time. false: one can join before the first update of a trainer step and at its
            end, and a run all of whose servers die in between ends.
    """

    served_within_nats: float | None = 0.3
    heal: bool = True
    replica_timeout_s: float | None = 1800.0
    max_replicas: int | None = None
    keep_pushed_weights: bool = True


@dataclass
class StaleKSeparateConfig(SeparateConfig):
    """Exactly `staleness_updates` optimizer updates old, trainer and rollout on separate devices.

    Generation of one batch overlaps the training of another for `staleness_updates` of at least one trainer step.
    What verl's `separate_async` reads (devices, checkpoint engine) stays where it is.
    """


@dataclass
class AdaptiveConfig:
    """A bound that the trust region moves, once a trainer step; see rule/adaptive.py.

    Args:
        enable: false: the bound is `staleness_updates` from the first step to the last.
        min_staleness_updates: the bound never falls below it, optimizer updates; a whole number of trainer steps.
        max_staleness_updates: where the bound begins, and never rises above; `staleness_updates` must be the same.
        target_masked_fraction: share of masked response tokens above which the bound falls.
        target_second_moment: of the log ratios in the trust region before masking, less the mismatch floor; above it
            the bound falls. m2po masks from its threshold on.
        quiet_share: share of both targets below which the bound may rise.
        waiting_share: share of a step for which the trainer must wait for rollouts, or the bound does not rise.
        patience_steps: trainer steps above a target, in a row, after which the bound falls.
    """

    enable: bool = False
    min_staleness_updates: int = 0
    max_staleness_updates: int | None = None
    target_masked_fraction: float = 0.01
    target_second_moment: float = 0.04
    quiet_share: float = 0.5
    waiting_share: float = 0.02
    patience_steps: int = 2


@dataclass
class ReplayConfig:
    """How often a rollout is trained.

    Args:
        max_uses: trainer steps that may train on the same rollout; 1 trains each once. null: no limit beside its age.
        fresh_share: share of the prompts of each batch, at least, that are new; a whole number of prompts. 1: all. A
            rollout is then trained 1 / `fresh_share` times on average.
        sampling: how the others are chosen: `uniform` over those that may be trained again, or the `newest`.
            `informative`: uniform over those that had an advantage. `positive`: uniform over those in which a
            trajectory succeeded (a score and an advantage above 0), and only such trajectories are trained again.
        baseline_groups: with `positive`, the advantage of what is trained again is its score above the median of the
            mean scores of so many groups; 0 leaves it as it is.
        ramp_steps: with `positive`, trainer steps over which its weight rises from 0 to 1; 0: it is 1 from the start.
    """

    max_uses: int | None = 1
    fresh_share: float = 1.0
    sampling: str = "uniform"
    baseline_groups: int = 0
    ramp_steps: int = 0


@dataclass
class ReferenceConfig:
    """The reference of verl's KL loss, as ReMix moves it; see reference.py. By default it is the base model.

    Args:
        least_base_share: the KL loss is taken to the base model with a share that falls from 1 to this, and with the
            rest to the policy at the start of the trainer step. 1: to the base model alone. ReMix has 0.5.
        constant_steps: trainer steps before the share falls.
        fall_every_steps: trainer steps from one fall to the next.
        share_fall: by how much the share falls each time.
        reincarnate_after_steps: trainer steps after which the reference becomes the present policy, the optimizer
            begins anew and no rollout is trained again. null: never. ReMix has 50 or 100.
    """

    least_base_share: float = 1.0
    constant_steps: int = 50
    fall_every_steps: int = 10
    share_fall: float = 0.1
    reincarnate_after_steps: int | None = None


@dataclass
class BoundedAsyncConfig(SeparateConfig):
    """No trained token older than `staleness_updates` optimizer updates; separate devices, generation never waits.

    Args:
        staleness_updates: age that no trained token exceeds when its trainer step begins, in optimizer updates. 0 is
            on-policy. Must be a whole number of trainer steps, see docs/staleness.md.
        min_usable_share: a finished group with at least this share of its generated tokens within the bound is trained
            with the older tokens masked, otherwise it is dropped and replaced; a generation that is expected to end
            below it is aborted. 0 masks whatever it can and never aborts; 1 never masks.
        adaptive: lets the bound move below `staleness_updates`.
        replay: how often a rollout is trained where generation is late. `max_uses` other than 1: instead of waiting the
            trainer fills its batch with what was trained before, down to `fresh_share` of new prompts.
        ahead_updates: with replay, how far generation runs ahead of training, in optimizer updates: the batches of so
            many and one more are generated or wait for their first use. null: eight trainer steps, or
            `staleness_updates` where that is less.
    """

    staleness_updates: int = 0
    min_usable_share: float = 0.25
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    ahead_updates: int | None = None

    @property
    def reuses(self) -> bool:
        """Whether a rollout may be trained more than once."""
        return self.replay.max_uses != 1

    def ahead_steps(self, clock: UpdateClock) -> int:
        """Trainer steps that generation runs ahead; without replay those of the bound.

        Raises:
            WrongValue: `ahead_updates` is no whole number of trainer steps.
        """
        bound, updates = clock.steps(self.staleness_updates), self.ahead_updates
        if not self.reuses:
            return bound
        if updates is None:
            return min(AHEAD_STEPS, bound)
        try:
            return clock.steps(updates, AHEAD)
        except StalenessUnitsError as error:
            remedy = "See the table of units in docs/staleness.md"
            raise WrongValue(Problem(AHEAD, updates, str(error), remedy)) from error


@dataclass
class ReplayModeConfig(StaleKConfig):
    """A batch is part new rollouts, part rollouts that were trained before and are at most `staleness_updates` old.

    Trainer and rollout share the devices; new rollouts come from the present weights.

    Args:
        staleness_updates: age that no trained token exceeds when its trainer step begins, in optimizer updates. 0
            trains new rollouts only. Must be a whole number of trainer steps, see docs/staleness.md.
        replay: how often a rollout is trained.
        reference: what the KL loss is taken to.
    """

    staleness_updates: int = 0
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)


MODES: dict[str, type[StaleKConfig]] = {
    "stale_k": StaleKConfig,
    "stale_k_separate": StaleKSeparateConfig,
    "bounded_async": BoundedAsyncConfig,
    "replay": ReplayModeConfig,
}

MODE_DEFAULTS: dict[str, dict[str, Any]] = {name: asdict(config()) for name, config in MODES.items()}

SEPARATE_MODES = ("stale_k_separate", "bounded_async")
"""Modes whose rollout has devices of its own."""

HEALING = ("heal", "replica_timeout_s", "max_replicas", "keep_pushed_weights")
"""Settings of these modes alone, which another mode is refused with a reason of its own."""


def first_uses(fresh_share: float, batch_size: int) -> int | None:
    """Prompts of a batch that are `fresh_share` of it; None if that is no whole number of at least 1."""
    count = round(fresh_share * batch_size)
    return count if count >= 1 and math.isclose(count, fresh_share * batch_size, rel_tol=1e-9) else None


def is_chosen(config: DictConfig) -> bool:
    """Whether `config` runs in a trainer mode of this package."""
    mode = read(config, TRAINER_MODE)
    return isinstance(mode, str) and mode in MODES


def make_clock(config: DictConfig) -> UpdateClock:
    """The clock of a verl configuration.

    Raises:
        StalenessUnitsError: its batch sizes make none.
    """
    return UpdateClock(
        read(config, "data.train_batch_size"),
        read(config, "actor_rollout_ref.actor.ppo_mini_batch_size"),
        read(config, "actor_rollout_ref.actor.ppo_epochs", 1),
    )


def keeps_a_journal(config: DictConfig) -> bool:
    """Whether a restart takes rollouts back from a journal."""
    return load_mode_config(config, config.trainer.v1.trainer_mode).journal


def heals(config: DictConfig) -> bool:
    """Whether processes that can be replaced are replaced where they die; a mode without the setting replaces them."""
    return bool(getattr(load_mode_config(config, config.trainer.v1.trainer_mode), "heal", True))


class SettingError(WrongValue):
    """A key that a mode does not have, or a value of another type."""


def load_mode_config(config: DictConfig, mode: str) -> StaleKConfig:
    """The settings of `mode` in verl's configuration, defaults filled in.

    Raises:
        SettingError: a key that the mode does not have, or a value of another type.
    """
    section = read(config, f"trainer.v1.{mode}")
    known = f"The settings are: {', '.join(MODE_DEFAULTS[mode])}"
    if section is not None and not isinstance(section, DictConfig):
        raise SettingError(Problem(f"trainer.v1.{mode}", section, "it is no section of settings", known))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(MODES[mode]), section or {})
        loaded = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = f"trainer.v1.{mode}.{error.full_key}"
        value = OmegaConf.select(section, error.full_key) if section and error.full_key else None
        if error.full_key in HEALING and mode not in SEPARATE_MODES:
            why = "trainer and rollout share processes in this mode, and a dead server cannot be replaced alone"
            remedy = f"Leave it out; trainer.v1.{mode}.restarts restarts the command after an error"
            raise SettingError(Problem(key, value, why, remedy)) from error
        raise SettingError(Problem(key, value, str(error).splitlines()[0], known)) from error
    assert isinstance(loaded, StaleKConfig)
    return loaded
