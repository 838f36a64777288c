"""What in a configuration contradicts the staleness that it asks for: found before anything is started.

Pure: configuration in, problems out. Nothing is changed here; what a mode needs it sets itself, in trainer.py.
"""

from omegaconf import DictConfig, OmegaConf

from verl_m2po.ground.problem import Problem
from verl_m2po.staleness.config import ON_FAILED_TRAJECTORY, BoundedAsyncConfig, StaleKConfig, load_mode_config
from verl_m2po.staleness.rows.codec import BYTES_PER_PROMPT_TOKEN, BYTES_PER_RESPONSE_TOKEN
from verl_m2po.staleness.rule.units import StalenessUnitsError, UpdateClock

ROW_OVERHEAD_BYTES = 6144
"""What one trajectory costs besides its tokens: Python fields, TransferQueue's records, its share of the prompt.

Measured 4 to 5 kB in the storage process (docs/benchmarks.md, "Taking a batch out").
"""

BEST_OF_A_GROUP = ("grpo_passk", "max_at_k")
"""Advantage estimators that look for the best of independent trajectories."""

SEPARATE_MODES = ("stale_k_separate", "bounded_async")


class PreflightError(ValueError):
    """The configuration contradicts the staleness that it asks for."""


def has_proximal_policy(config: DictConfig) -> bool:
    """Whether verl recomputes `old_log_probs` and puts the age of the data into weights proximal over behaviour policy.

    Recomputed without such weights, the age would be in no ratio that a loss sees.
    """
    correction = OmegaConf.select(config, "algorithm.rollout_correction") or {}
    if correction.get("bypass_mode", False):
        return False
    return correction.get("rollout_is") is not None or correction.get("rollout_rs") is not None


def make_clock(config: DictConfig) -> UpdateClock:
    """The clock of a verl configuration."""
    actor = config.actor_rollout_ref.actor
    return UpdateClock(config.data.train_batch_size, actor.ppo_mini_batch_size, actor.get("ppo_epochs", 1))


def keeps_a_journal(config: DictConfig) -> bool:
    """Whether a restart takes rollouts back from a journal."""
    mode = config.trainer.v1.trainer_mode
    return load_mode_config(config, mode).journal


def _steps_between_checkpoints(config: DictConfig) -> int:
    """0 where the run writes none of its own accord."""
    return max(0, config.trainer.get("save_freq") or 0)


def _replayed_batches(config: DictConfig) -> int:
    """Batches that a journal puts back at once, beyond those that waited at the checkpoint: one a step since then.

    A run without checkpoints begins again, with all of its steps.
    """
    if not keeps_a_journal(config):
        return 0
    return _steps_between_checkpoints(config) or config.trainer.get("total_training_steps") or 0


def estimate_buffer_bytes(config: DictConfig, staleness_steps: int) -> int:
    """Memory for the waiting rollouts if every response has its full length, in bytes.

    staleness_steps + 1 batches wait at most, and with a journal as many more as there are steps from one checkpoint to
    the next; see codec.py for the price of a token. Without checkpoints a long run would need more than any machine
    has, for a crash that may never come: that is not counted.
    """
    rollout = config.actor_rollout_ref.rollout
    replayed = _steps_between_checkpoints(config) if keeps_a_journal(config) else 0
    rows = (staleness_steps + 1 + replayed) * config.data.train_batch_size * rollout.n
    response_bytes = config.data.max_response_length * BYTES_PER_RESPONSE_TOKEN
    prompt_bytes = config.data.max_prompt_length * BYTES_PER_PROMPT_TOKEN
    return rows * (response_bytes + prompt_bytes + ROW_OVERHEAD_BYTES)


def buffer_rows(config: DictConfig, staleness_steps: int) -> int:
    """Entries that TransferQueue must hold: staleness_steps + 1 batches that wait and the one that is trained.

    What a journal puts back after a crash is among them. An entry is a prompt or a response; validation comes on top.
    """
    batches = staleness_steps + 2 + _replayed_batches(config)
    return batches * config.data.train_batch_size * (1 + config.actor_rollout_ref.rollout.n)


def check_run_length(staleness_steps: int, clock: UpdateClock, mode: str, total_steps: int) -> list[Problem]:
    """Whether the staleness fits into the run at all.

    Args:
        total_steps: trainer steps of the whole run.
    """
    if staleness_steps == 0 or staleness_steps < total_steps:
        return []
    longest = clock.updates(total_steps - 1)
    return [
        Problem(
            f"trainer.v1.{mode}.staleness_updates",
            clock.updates(staleness_steps),
            f"the run has {total_steps} trainer steps of {clock.updates_per_step} updates, so it would end before it "
            "trains on a rollout of its own weights",
            f"Set it to at most {longest}, or make the run longer (trainer.total_training_steps, trainer.total_epochs)",
        )
    ]


def check(config: DictConfig, available_memory_bytes: int | None = None) -> list[Problem]:
    """All problems of a verl configuration whose `trainer.v1.trainer_mode` is one of ours.

    Args:
        config: verl's configuration, resolved.
        available_memory_bytes: memory of the machine; None leaves the memory unchecked where no limit is configured.
    """
    mode = config.trainer.v1.trainer_mode
    try:
        settings = load_mode_config(config, mode)
    except ValueError as error:
        return [Problem(f"trainer.v1.{mode}", "", str(error), "Correct the key")]
    return [
        *_check_units(config, mode, settings),
        *_check_settings(config, mode, settings),
        *_check_failed_trajectories(config, mode, settings),
        *_check_sampling(config),
        *_check_trainer(config, mode),
        *_check_devices(config, mode),
        *_check_memory(config, mode, settings, available_memory_bytes),
        *_check_capacity(config, settings),
    ]


def _check_units(config: DictConfig, mode: str, settings: StaleKConfig) -> list[Problem]:
    key = f"trainer.v1.{mode}.staleness_updates"
    try:
        clock = make_clock(config)
        clock.steps(settings.staleness_updates, key)
    except StalenessUnitsError as error:
        return [Problem(key, settings.staleness_updates, str(error), "See the table of units in docs/staleness.md")]
    problems = []
    if clock.ppo_epochs > 1:
        problems.append(
            Problem(
                "actor_rollout_ref.actor.ppo_epochs",
                clock.ppo_epochs,
                f"every batch is trained {clock.ppo_epochs} times, so its last epoch is "
                f"{clock.updates_per_step - clock.mini_batches_per_step} updates staler than its first",
                "Set it to 1 to have one age per batch",
                is_fatal=False,
            )
        )
    return problems


def _check_settings(config: DictConfig, mode: str, settings: StaleKConfig) -> list[Problem]:
    shares = {"max_failed_fraction": settings.max_failed_fraction}
    if isinstance(settings, BoundedAsyncConfig):
        shares["min_usable_share"] = settings.min_usable_share
    problems = [
        Problem(f"trainer.v1.{mode}.{name}", value, "it is a share", "Set it to a number from 0 to 1")
        for name, value in shares.items()
        if not 0 <= value <= 1
    ]
    if settings.failed_window_groups < 1:
        value = settings.failed_window_groups
        problems.append(
            Problem(f"trainer.v1.{mode}.failed_window_groups", value, "it counts groups", "Set it to 1 or more")
        )
    problems += _check_sync_step(config, mode, settings)
    timeout_s = settings.generation_timeout_s
    if timeout_s is not None and timeout_s <= 0:
        problems.append(
            Problem(
                f"trainer.v1.{mode}.generation_timeout_s", timeout_s, "no generation could ever end", "Set null or more"
            )
        )
    if settings.stop_wait_s is not None and settings.stop_wait_s < 0:
        name = f"trainer.v1.{mode}.stop_wait_s"
        problems.append(Problem(name, settings.stop_wait_s, "no wait is that short", "Set null, 0 or more"))
    return problems


def _check_failed_trajectories(config: DictConfig, mode: str, settings: StaleKConfig) -> list[Problem]:
    """Where a masked copy of a sibling would change more than it should, it is refused."""
    key, value = f"trainer.v1.{mode}.on_failed_trajectory", settings.on_failed_trajectory
    if value not in ON_FAILED_TRAJECTORY:
        return [Problem(key, value, "there is no such choice", f"Set it to {' or '.join(ON_FAILED_TRAJECTORY)}")]
    if value != "mask":
        return []
    problems = []
    estimator = OmegaConf.select(config, "algorithm.adv_estimator")
    if estimator in BEST_OF_A_GROUP:
        why = (
            f"a failed trajectory becomes a masked copy of a sibling, and algorithm.adv_estimator={estimator} would "
            "take it for another attempt, as good as the best"
        )
        problems.append(Problem(key, value, why, "Set it to refill, or take another estimator"))
    if OmegaConf.select(config, "algorithm.use_kl_in_reward"):
        why = (
            "a masked copy has no token to which algorithm.use_kl_in_reward=true could put its penalty, so the group's "
            "baseline and an adaptive coefficient would be too small"
        )
        problems.append(Problem(key, value, why, "Set it to refill, or use actor_rollout_ref.actor.use_kl_loss"))
    responses = config.actor_rollout_ref.rollout.n
    if responses == 1:
        why = "with one response to a prompt (actor_rollout_ref.rollout.n=1) there is no sibling, and it is as refill"
        problems.append(Problem(key, value, why, "Set it to refill", is_fatal=False))
    return problems


def _check_sync_step(config: DictConfig, mode: str, settings: StaleKConfig) -> list[Problem]:
    """1 is the default and means nothing; the modes set what follows from the batch sizes."""
    value = settings.parameter_sync_step
    if value == 1:
        return []
    key, remedy = (
        f"trainer.v1.{mode}.parameter_sync_step",
        "Remove it; actor.ppo_mini_batch_size sets the updates per step",
    )
    if mode not in SEPARATE_MODES:
        why = "where trainer and rollout share the devices, the weights are pushed once per trainer step"
        return [Problem(key, value, why, remedy)]
    try:
        mini_batches = make_clock(config).mini_batches_per_step
    except StalenessUnitsError:
        return []  # reported by _check_units
    if value == mini_batches:
        return []
    why = f"one weight version is pushed per trainer step, which has {mini_batches} mini-batches"
    return [Problem(key, value, why, remedy)]


def _check_sampling(config: DictConfig) -> list[Problem]:
    rollout = config.actor_rollout_ref.rollout
    prefix = "actor_rollout_ref.rollout"
    problems = []
    truncated = "what is inside is renormalised and what is outside has probability 0, so the importance "
    if rollout.get("top_p", 1.0) < 1:
        why = f"nucleus sampling truncates the behaviour policy: {truncated}ratio is biased"
        problems.append(Problem(f"{prefix}.top_p", rollout.top_p, why, "Set it to 1.0"))
    if rollout.get("top_k", -1) not in (-1, 0):
        why = f"top-k sampling truncates the behaviour policy: {truncated}ratio is biased"
        problems.append(Problem(f"{prefix}.top_k", rollout.top_k, why, "Set it to -1"))
    if rollout.temperature <= 0:
        why = "greedy sampling has no behaviour probabilities"
        problems.append(Problem(f"{prefix}.temperature", rollout.temperature, why, "Set it to 1.0"))
    mode = rollout.get("logprobs_mode", "processed_logprobs")
    if rollout.temperature != 1 and mode == "raw_logprobs":
        why = "the rollout reports log-probs before the temperature, the trainer computes them after it"
        problems.append(Problem(f"{prefix}.logprobs_mode", mode, why, "Set it to processed_logprobs"))
    return problems


def _check_trainer(config: DictConfig, mode: str) -> list[Problem]:
    problems = []
    if not config.trainer.get("use_v1", True):
        why = f"the trainer mode {mode} exists in verl's v1 trainer only"
        problems.append(Problem("trainer.use_v1", False, why, "Set it to true"))
    if OmegaConf.select(config, "algorithm.filter_groups.enable"):
        why = "dynamic sampling (DAPO) replaces groups after generation, which the staleness modes do not do yet"
        problems.append(Problem("algorithm.filter_groups.enable", True, why, "Set it to false"))
    if OmegaConf.select(config, "skip.rollout_tq.enable"):
        why = "skipped rollouts have no weight version"
        problems.append(Problem("skip.rollout_tq.enable", True, why, "Set it to false"))
    if OmegaConf.select(config, "trainer.v1.separate_async.hybrid_rollout.enable_switch") and mode in SEPARATE_MODES:
        why = "lending the training devices to the rollout is driven by verl's own buffer"
        key = "trainer.v1.separate_async.hybrid_rollout.enable_switch"
        problems.append(Problem(key, True, why, "Set it to false"))
    if OmegaConf.select(config, "actor_rollout_ref.actor.checkpoint.async_save"):
        why = "verl would still be writing when the checkpoint is declared whole"
        problems.append(Problem("actor_rollout_ref.actor.checkpoint.async_save", True, why, "Set it to false"))
    sampler = OmegaConf.select(config, "trainer.v1.sampler.custom_sampler.path")
    # hardware=cpu sets one of ours, which only makes verl's own buffer poll faster; it is not used here.
    if sampler and not sampler.startswith("pkg://verl_m2po."):
        why = f"the mode {mode} brings its own sampler"
        problems.append(Problem("trainer.v1.sampler.custom_sampler.path", sampler, why, "Remove it"))
    manager = OmegaConf.select(config, "actor_rollout_ref.rollout.agent.agent_loop_manager_class")
    if manager and not manager.startswith("verl_m2po."):
        key = "actor_rollout_ref.rollout.agent.agent_loop_manager_class"
        why = f"the mode {mode} needs verl_m2po.staleness.rollout.agent_loop.StalenessAgentLoopManager"
        problems.append(Problem(key, manager, why, "Remove it; custom agent loops are not affected"))
    return problems


def _check_devices(config: DictConfig, mode: str) -> list[Problem]:
    """Whether a separate mode has devices that generate; verl asks in an assertion, and after Ray has started."""
    if mode not in SEPARATE_MODES:
        return []
    rollout, prefix = config.actor_rollout_ref.rollout, "actor_rollout_ref.rollout"
    option = "Add staleness=bounded_async or staleness=s64_separate, with hardware=eight_gpu_separate or cpu"
    problems = []
    for name, why in (("nnodes", "node"), ("n_gpus_per_node", "device of such a node")):
        value = rollout.get(name) or 0
        if value < 1:
            why = f"the mode {mode} generates on devices of its own, and no {why} is given to it"
            problems.append(Problem(f"{prefix}.{name}", value, why, f"{option}, or set it to 1 or more"))
    backend = OmegaConf.select(config, f"{prefix}.checkpoint_engine.backend")
    if backend in (None, "naive"):
        why = "it moves weights within one process, and the rollout has processes of its own"
        remedy = f"{option}, or set it to nccl (gloo on the CPU)"
        problems.append(Problem(f"{prefix}.checkpoint_engine.backend", backend, why, remedy))
    if OmegaConf.select(config, "actor_rollout_ref.hybrid_engine") is not False:
        why = f"verl keeps a second rollout on the training devices, which the mode {mode} never asks"
        problems.append(
            Problem("actor_rollout_ref.hybrid_engine", True, why, "Set it to false to have the memory", is_fatal=False)
        )
    return problems


def _waiting(staleness_steps: int, replayed: int) -> str:
    waiting = f"{staleness_steps + 1} batches of rollouts wait"
    return f"{waiting} and after a crash up to {replayed} more from the journal" if replayed else waiting


def _check_memory(
    config: DictConfig, mode: str, settings: StaleKConfig, available_memory_bytes: int | None
) -> list[Problem]:
    limit_gib = settings.buffer_memory_limit_gib
    if limit_gib is None and available_memory_bytes is not None:
        limit_gib = available_memory_bytes / 2 / 2**30
    if limit_gib is None or OmegaConf.select(config, "transfer_queue.backend.SimpleStorage.ssd_offload.enabled"):
        return []
    try:
        staleness_steps = make_clock(config).steps(settings.staleness_updates)
    except StalenessUnitsError:
        return []  # reported by _check_units
    need_gib = estimate_buffer_bytes(config, staleness_steps) / 2**30
    if need_gib <= limit_gib:
        return []
    replayed = _steps_between_checkpoints(config) if settings.journal else 0
    return [
        Problem(
            f"trainer.v1.{mode}.staleness_updates",
            settings.staleness_updates,
            f"{_waiting(staleness_steps, replayed)}, which needs up to {need_gib:.1f} GiB at full length; the limit is "
            f"{limit_gib:.1f} GiB",
            "Let TransferQueue keep them on disk "
            "(+transfer_queue.backend.SimpleStorage.ssd_offload.enabled=true, +<the same>.path=<folder>, "
            f"+<the same>.threshold_bytes=1024), raise trainer.v1.{mode}.buffer_memory_limit_gib, or lower the "
            f"staleness{' or trainer.save_freq' if replayed else ''}",
        )
    ]


def _check_capacity(config: DictConfig, settings: StaleKConfig) -> list[Problem]:
    key = "transfer_queue.backend.SimpleStorage.total_storage_size"
    capacity = OmegaConf.select(config, key)
    if capacity is None:
        return []
    try:
        staleness_steps = make_clock(config).steps(settings.staleness_updates)
    except StalenessUnitsError:
        return []  # reported by _check_units
    need = buffer_rows(config, staleness_steps)
    if need <= capacity:
        return []
    waiting = _waiting(staleness_steps, _replayed_batches(config))
    why = f"{waiting}, which are up to {need} entries with the one that is trained"
    return [Problem(key, capacity, why, "Set it to null: no limit. Their memory is checked by itself")]
