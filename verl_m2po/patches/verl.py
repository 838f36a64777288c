"""Patches of verl."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

from verl_m2po.patches.record import Patch, Scope, replace


def name_process_group_backend_once(distributed: ModuleType) -> None:
    """Let verl initialise torch.distributed on the CPU.

    Symptom: ``ValueError: Duplicate device type cpu in backend string: cpu:gloo,cpu:gloo``.
    Cause: verl/utils/distributed.py (0.9.1, l.89) builds "cpu:gloo,<device>:<backend>" for any device.
    Delete when: verl leaves out the second half where the device is the CPU.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def initialize(timeout_second: int | None = None, backend: str | None = None) -> Any:
            return original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

        return initialize

    replace(distributed, "initialize_global_process_group_ray", make)


def copy_saved_parameters(fsdp_utils: ModuleType) -> None:
    """Make the parameters that verl saves to the CPU a copy.

    Symptom: none; a silent wrong result. The saved proximal policy of decoupled PPO follows the live weights.
    Cause: verl/utils/fsdp_utils.py (0.9.1, l.1167 and 1180) saves ``tensor.detach().cpu()``, which is an alias when the
    tensor is on the CPU already.
    Delete when: verl clones there.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def save(model: Any) -> Any:
            state, spec = original(model)
            return {name: (tensor.clone(), tensor_spec) for name, (tensor, tensor_spec) in state.items()}, spec

        return save

    replace(fsdp_utils, "fsdp2_sharded_save_to_cpu", make)


def _of_this_cluster(handle: str) -> str:
    """`handle` with the process id of this node's raylet, which Ray's workers have and hand on to vLLM's processes."""
    return handle.replace("rl-colocate-zmq-", f"rl-colocate-zmq-{os.environ.get('RAY_RAYLET_PID', '')}-", 1)


def give_each_cluster_its_weight_sockets(vllm_rollout: ModuleType) -> None:
    """Let two runs on one machine push their weights at the same time; this is the sending side.

    Symptom: one run hangs in a weight update after ``KeyError: 'name'`` in its engine, or, silently, an engine loads
    the weights of another run.
    Cause: the socket is /tmp/rl-colocate-zmq-<Ray job>-replica-<i>-rank-<j>.sock (verl/workers/rollout/vllm_rollout/
    vllm_rollout.py, 0.9.1, l.141, and utils.py, l.431), and the first job of every Ray cluster has the same number.
    Delete when: the path names the cluster, or is drawn at random (verl issue 6233, closed too early).
    """

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.zmq_handle = _of_this_cluster(self.zmq_handle)

        return initialize

    replace(vllm_rollout.ServerAdapter, "__init__", make)


def find_the_weight_sockets_of_this_cluster(utils: ModuleType) -> None:
    """The receiving side of `give_each_cluster_its_weight_sockets`, in vLLM's workers.

    Symptom: the same.
    Cause: the same, on the other side.
    Delete when: that one is deleted.
    """

    def make(original: Callable[[Any], str]) -> Callable[[Any], str]:
        def handle(self: Any) -> str:
            return _of_this_cluster(original(self))

        return handle

    replace(utils.vLLMColocateWorkerExtension, "_get_zmq_handle", make)


@contextmanager
def quiet_separate_setup() -> Iterator[None]:
    """Let the separate trainer be set up without replicas on the training devices, whatever the log level.

    Symptom: ``TypeError: Logger._log() got an unexpected keyword argument 'flush'`` as the trainer starts.
    Cause: verl/trainer/ppo/v1/trainer_separate_async.py (0.9.1, l.181, `_setup`) calls ``logger.info(..., flush=True)``
    with ``hybrid_engine=false``; a logger does not know `flush`, and looks only if INFO is on, as it is by default.
    Delete when: verl leaves out the argument.
    """
    separate = logging.getLogger("verl.trainer.ppo.v1.trainer_separate_async")
    level = separate.level
    separate.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        separate.setLevel(level)


@contextmanager
def around_optimizer_step(engine: Any, around: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter `around` for every optimizer step of `engine` in this block, when all losses of its mini-batch are known.

    Symptom: none; there would be no place for a step scale that depends on the whole mini-batch (VCPO).
    Cause: `train_batch` of verl's engines (verl/workers/engine/base.py, 0.9.1, l.128) calls ``self.optimizer_step``
    after the last backward, and has no hook there.
    Delete when: verl's engines have a hook before the step.

    Args:
        engine: verl's training engine.
        around: Makes the context of one step, after the last backward.
    """
    step = engine.optimizer_step

    def surrounded() -> Any:
        with around():
            return step()

    engine.optimizer_step = surrounded
    try:
        yield
    finally:
        engine.optimizer_step = step


_ROLLOUT = "verl.workers.rollout.vllm_rollout"

PATCHES = (
    Patch(
        name_process_group_backend_once,
        replaces="verl.utils.distributed.initialize_global_process_group_ray",
        scope=Scope.CPU,
        after="verl.utils.distributed",
    ),
    Patch(
        copy_saved_parameters,
        replaces="verl.utils.fsdp_utils.fsdp2_sharded_save_to_cpu",
        scope=Scope.CPU,
        after="verl.utils.fsdp_utils",
    ),
    Patch(
        give_each_cluster_its_weight_sockets,
        replaces=f"{_ROLLOUT}.vllm_rollout.ServerAdapter.__init__",
        scope=Scope.CPU,
        after=f"{_ROLLOUT}.vllm_rollout",
    ),
    Patch(
        find_the_weight_sockets_of_this_cluster,
        replaces=f"{_ROLLOUT}.utils.vLLMColocateWorkerExtension._get_zmq_handle",
        scope=Scope.CPU,
        after=f"{_ROLLOUT}.utils",
    ),
    Patch(
        quiet_separate_setup,
        replaces="verl.trainer.ppo.v1.trainer_separate_async.logger",
        scope=Scope.SEPARATE_MODES,
    ),
    Patch(
        around_optimizer_step,
        replaces="verl.workers.engine.base.BaseEngine.optimizer_step",
        scope=Scope.STEP_SCALE,
    ),
)
