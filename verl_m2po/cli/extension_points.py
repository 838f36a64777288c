"""What of verl this package holds on to, as data, and whether the installed verl still has it.

`python -m verl_m2po.cli.extension_points` prints what moved and exits with 1 if anything did; `make test-verl-next`
runs it against a version of verl to come. docs/plugin.md has the table.
"""

import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any


@dataclass(frozen=True)
class Point:
    """A function or method of verl's that this package calls, overrides or registers with.

    Args:
        name: Its dotted name.
        parameters: Its parameters, separated by commas; one with a default ends in "=".
        use: What it is for here.
        test: The file of the test that runs it, from the top of the repository.
    """

    name: str
    parameters: str
    use: str
    test: str


_V1 = "verl.trainer.ppo.v1"
_TRAINER = f"{_V1}.trainer_base.PPOTrainer"
_COLOCATED = f"{_V1}.trainer_colocate_async.PPOTrainerColocateAsync"
_SEPARATE = f"{_V1}.trainer_separate_async.PPOTrainerSeparateAsync"
_SERVERS = "verl.workers.rollout.llm_server.LLMServerManager"
_CHECKPOINTS = "verl.checkpoint_engine.base"
_WORKER = "verl.workers.engine_workers.TrainingWorker"
_ALGORITHMS = "verl.trainer.ppo.core_algos"
_MODES, _RESTARTS = "tests/e2e/test_staleness_modes.py", "tests/staleness/test_checkpoint.py"
_REPLAY = "tests/e2e/test_replay.py"
_BUFFER, _ACTOR = "tests/staleness/test_buffer.py", "tests/actor/test_worker.py"

POINTS = (
    Point(f"{_ALGORITHMS}.register_policy_loss", "name", "the losses", "tests/plugin/test_plugin.py"),
    Point(f"{_ALGORITHMS}.register_adv_est", "name_or_enum", "the estimators", "tests/advantages/test_advantages.py"),
    Point(
        f"{_ALGORITHMS}.agg_loss",
        "loss_mat, loss_mask, loss_agg_mode, dp_size=, batch_num_tokens=, global_batch_size=, loss_scale_factor=",
        "every loss ends in it",
        "tests/losses/test_importance_losses.py",
    ),
    Point(
        "verl.workers.utils.losses.ppo_loss",
        "config, model_output, data, dp_group=",
        "calls the losses; its `config` says which",
        _ACTOR,
    ),
    Point(f"{_WORKER}.train_batch", "self, data", "one optimizer update", _ACTOR),
    Point(f"{_WORKER}.train_mini_batch", "self, data", "the updates of a step", _ACTOR),
    Point(
        f"{_WORKER}.save_checkpoint", "self, local_path, hdfs_path=, global_step=, max_ckpt_to_keep=", "state", _ACTOR
    ),
    Point(f"{_WORKER}.load_checkpoint", "self, local_path, hdfs_path=, del_local_after_load=", "state", _ACTOR),
    Point("verl.workers.engine.base.BaseEngine.infer_batch", "self, data, loss_function=", "the look ahead", _ACTOR),
    Point("verl.workers.engine.base.BaseEngine.optimizer_step", "self", "the step scale", "tests/test_patches.py"),
    Point(
        "verl.workers.engine.base.EngineRegistry.register",
        "model_type, backend, device=, vendor=",
        "FSDP2 on the CPU",
        "tests/plugin/test_plugin.py",
    ),
    Point(
        "verl.plugin.platform.platform_manager.PlatformRegistry.register",
        "platform",
        "the CPU platform",
        "tests/cpu/test_platform.py",
    ),
    Point(f"{_V1}.trainer_base.register_trainer", "name", "the modes", "tests/plugin/test_plugin.py"),
    Point(f"{_TRAINER}.__init__", "self, config", "checks and settings come before it", _MODES),
    Point(f"{_TRAINER}.init", "self", "starts the processes; watched, limited", "tests/staleness/test_deadline.py"),
    Point(f"{_TRAINER}.on_init_end", "self", "pushes the first weights", _MODES),
    Point(f"{_TRAINER}.fit", "self, agent_loop_manager", "watched; ends with a checkpoint", _MODES),
    Point(f"{_TRAINER}._build_replay_buffer", "self", "our buffer instead of verl's", _BUFFER),
    Point(f"{_TRAINER}._init_dataloader", "self", "the length of the run", _MODES),
    Point(f"{_TRAINER}._compute_advantage", "self, batch, metrics", "the age of each row", _MODES),
    Point(f"{_TRAINER}._compute_ref_log_prob", "self, batch, metrics", "its log-probs are mixed", _REPLAY),
    Point(f"{_TRAINER}._init_resource_pool_mgr", "self", "its `role_worker_mapping` names the worker", _REPLAY),
    Point(f"{_TRAINER}.on_step_begin", "self", "the reference becomes the actor", _REPLAY),
    Point(
        "verl.workers.engine_workers.ActorRolloutRefWorker.__init__",
        "self, config, role, distillation_config=, **kwargs",
        "has actor and reference in one process",
        "tests/staleness/test_reincarnation.py",
    ),
    Point(f"{_TRAINER}._save_checkpoint", "self", "written beside, then renamed", _RESTARTS),
    Point(f"{_TRAINER}._load_checkpoint", "self", "the state of the buffer", _RESTARTS),
    Point(f"{_TRAINER}._reissue_inflight_prompts", "self, partition_id=", "ours are opened again", _RESTARTS),
    Point(f"{_TRAINER}._rollout_server_managers", "self", "whom to watch", "tests/staleness/test_liveness.py"),
    Point(
        "verl.experimental.reward_loop.RewardLoopManager._init_reward_loop_workers",
        "self",
        "starts the reward workers, of a class that Ray starts again",
        "tests/staleness/test_reward_workers.py",
    ),
    Point(f"{_COLOCATED}.on_sample_end", "self", "puts the rollout to sleep", _MODES),
    Point(f"{_COLOCATED}.on_step_end", "self", "pushes weights", _MODES),
    Point(f"{_SEPARATE}._setup", "self", "starts the replicas", _MODES),
    Point(f"{_SEPARATE}.on_step_end", "self", "pushes weights", _MODES),
    Point(
        f"{_V1}.replay_buffer.ReplayBuffer.__init__",
        "self, trainer_mode, trainer_config, max_off_policy_threshold, max_off_policy_strategy, sampler_kwargs, "
        "poll_interval=, refill_fn=, filter_groups_metric=, train_batch_size=, gen_batch_size=, "
        "max_inflight_gen_batches=, sync_refill_failed_groups=",
        "the base of our buffer",
        _BUFFER,
    ),
    Point(f"{_V1}.replay_buffer.ReplayBuffer.sample", "self, global_steps, partition_id, batch_size", "ours", _BUFFER),
    Point(
        f"{_V1}.agent_loop_tq.AgentLoopManagerTQ.__init__",
        "self, *args, **kwargs",
        "takes our class of worker",
        "tests/staleness/test_generation.py",
    ),
    Point(f"{_SERVERS}.create", "*args, **kwargs", "starts the servers of the separate modes", _MODES),
    Point(f"{_SERVERS}.get_client", "self, client_cls=, **kwargs", "our client, which notes versions", _MODES),
    Point(f"{_SERVERS}.get_replicas", "self", "whom to watch", "tests/staleness/test_liveness.py"),
    Point(f"{_SERVERS}.get_addresses", "self", "whose engine to watch", "tests/staleness/test_liveness.py"),
    Point(f"{_CHECKPOINTS}.CheckpointEngineManager.update_weights", "self, global_steps=", "pushes", _MODES),
    Point(f"{_CHECKPOINTS}.CheckpointEngineManager.abort_replicas", "self, reject_request=", "a stop in time", _MODES),
    Point(f"{_CHECKPOINTS}.CheckpointEngineManager.sleep_replicas", "self", "a stop in time", _MODES),
    Point(
        f"{_CHECKPOINTS}.CheckpointEngine.send_weights",
        "self, weights, global_steps=",
        "`gloo`",
        "tests/cpu/test_weight_transfer.py",
    ),
    Point(
        f"{_CHECKPOINTS}.CheckpointEngine.receive_weights",
        "self, global_steps=",
        "`gloo`",
        "tests/cpu/test_weight_transfer.py",
    ),
)


def moved(points: tuple[Point, ...] = POINTS) -> Iterator[str]:
    """Yield what the installed verl no longer has, or takes otherwise."""
    for point in points:
        try:
            found = parameters(_find(point.name))
        except (ImportError, AttributeError) as error:
            yield f"{point.name} is gone ({error}). It is for: {point.use}. Tested by {point.test}."
            continue
        if found != point.parameters:
            yield (
                f"{point.name} takes ({found}), and took ({point.parameters}). It is for: {point.use}. "
                f"Tested by {point.test}."
            )


def parameters(function: Any) -> str:
    """Names of the parameters of `function` as a `Point` writes them."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(
        f"{stars.get(parameter.kind, '')}{parameter.name}{'' if parameter.default is parameter.empty else '='}"
        for parameter in inspect.signature(function).parameters.values()
    )


def _find(name: str) -> Any:
    """What has the dotted name `name`.

    Raises ImportError or AttributeError where nothing has it.
    """
    parts = name.split(".")
    # A class of verl's begins with a capital letter, its modules do not; else the last part is a function.
    first_class = next((i for i, part in enumerate(parts) if part[0].isupper()), len(parts) - 1)
    return reduce(getattr, parts[first_class:], importlib.import_module(".".join(parts[:first_class])))


def main() -> int:
    """Print what moved, and what cannot be built although its signature is as it was; the exit status."""
    import verl

    from verl_m2po.cli.doctor import built_problems

    problems, broken = list(moved()), built_problems()
    sys.stdout.write("".join(f"moved: {problem}\n" for problem in problems))
    sys.stdout.write("".join(f"broken: {problem}\n" for problem in broken))
    counts = f"{len(problems)} of {len(POINTS)} points moved, {len(broken)} constructions fail"
    sys.stdout.write(f"verl {verl.__version__} in {verl.__path__[0]}: {counts}\n")
    return 1 if problems or broken else 0


if __name__ == "__main__":
    sys.exit(main())
