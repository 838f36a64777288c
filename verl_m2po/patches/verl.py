"""Patches of verl."""

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
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


def load_critics_without_flash_attention(model: ModuleType) -> None:
    """Let a critic attend with what its model's configuration says.

    Symptom: ``RuntimeError: model(...) is not a value head model, please install trl to make it valid``.
    Cause: verl/utils/model.py (0.9.1, l.649, `load_valuehead_model`) asks for ``flash_attention_2`` whatever
    `critic.model.override_config.attn_implementation` says, and takes its refusal for another kind of model.
    Delete when: verl passes the attention of the configuration on.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def load(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
            from transformers import AutoModelForTokenClassification

            return AutoModelForTokenClassification.from_pretrained(
                local_path,
                torch_dtype=torch_dtype,
                config=model_config,
                attn_implementation=model_config._attn_implementation,
                trust_remote_code=trust_remote_code,
            )

        return load

    replace(model, "load_valuehead_model", make)


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


_loading: ContextVar[Any] = ContextVar("verl_m2po_loading", default=None)
"""What the engine's worker answers, once it has loaded the weights that are being sent, as Ray's reference."""

_LOOK_EVERY_MS = 500


def remember_what_loads_the_weights(vllm_rollout: ModuleType) -> None:
    """Keep hold of the answer of the engine that weights are pushed to; see `fail_with_the_engine`.

    Symptom: the same.
    Cause: the sender does not know for whose answer it could look.
    Delete when: that one is deleted.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        async def execute(self: Any, method: str, non_block: bool = False, **kwargs: Any) -> Any:
            answer = await original(self, method, non_block=non_block, **kwargs)
            if non_block:
                _loading.set(answer)
            return answer

        return execute

    replace(vllm_rollout.ServerAdapter, "_execute_method", make)


class _Socket:
    """A socket of zmq on which one does not wait for an engine that has failed."""

    def __init__(self, socket: Any, answer: Any) -> None:
        self._socket, self._answer = socket, answer

    def send_pyobj(self, message: Any) -> None:
        """Send what verl sends, or raise the error of the engine that will not take it."""
        import zmq

        self._wait(zmq.POLLOUT)
        self._socket.send_pyobj(message)

    def recv(self) -> bytes:
        """What the engine sends, or its error, raised."""
        import zmq

        self._wait(zmq.POLLIN)
        return self._socket.recv()

    def _wait(self, event: int) -> None:
        import ray

        while not self._socket.poll(_LOOK_EVERY_MS, event):
            if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
                ray.get(self._answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


def fail_with_the_engine(transfer: ModuleType) -> None:
    """Let a push of weights end with the error of the engine that cannot load them.

    Symptom: the run hangs in a push of weights; the engine's error, for example an AttributeError of its model, is at
    most in a log.
    Cause: the sender (verl/workers/rollout/vllm_rollout/bucketed_weight_transfer.py, 0.9.1) waits for the engine in
    its socket without a limit, and verl looks at the engine's answer only after that (vllm_rollout.py, l.246).
    Delete when: verl looks at the answer while it sends.
    """

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def initialize(self: Any) -> None:
            original(self)
            self.socket = _Socket(self.socket, _loading.get())

        return initialize

    replace(transfer.BucketedWeightSender, "_init_socket", make)


def waiting_requests(server: Any) -> list[str]:
    """What a rollout server that is being closed has accepted and not begun, to be aborted. Called in its process.

    Symptom: a push of weights takes up to a minute longer where servers have more requests than they decode at a time;
    "Submission gate barrier timed out" in the server's log.
    Cause: `abort_all_requests` (verl/workers/rollout/vllm_rollout/vllm_async_server.py, 0.9.1, l.970) aborts only when
    every admitted request has had a first token, or after 60 s; what waits in vLLM's queue has had none.
    Delete when: verl aborts what waits as well.

    Args:
        server: verl's vLLM server. One of another engine has no such barrier and is left alone.
    """
    if not getattr(server, "_submission_paused", False) or not getattr(server, "_admitting", 0):
        return []
    states = list(server.engine.output_processor.request_states.items())
    # Without a token yet, so that none is lost; by the name that they came with, where vLLM gives them another.
    return [getattr(state, "external_req_id", request) for request, state in states if state.is_prefilling]


_cancelling: set[Future[None]] = set()
"""Python itself keeps no reference to what runs beside."""


def cancel(server: Any, requests: list[str]) -> None:
    """Cancel requests at verl's vLLM server, by the names that they came with. Called in its process.

    Symptom: what was given up is generated to its end, for nothing; "OutputProcessor.abort_requests() missing 1
    required positional argument: 'internal'" in the server's log.
    Cause: `abort_request` (verl/workers/rollout/vllm_rollout/vllm_async_server.py, 0.9.1, l.1046) knows vLLM's output
    processor before it gave requests names of its own (vllm/v1/engine/output_processor.py 0.28, l.471).
    Delete when: verl calls ``AsyncLLM.abort``.

    Args:
        server: verl's vLLM server.
        requests: one that is not there, or not any more, is left out.
    """
    if (handler := server.engine.output_handler) is None:
        return  # nothing has been asked of this engine yet
    # Ray calls this in a thread without an event loop: the engine's own is the one of its requests.
    cancelling = asyncio.run_coroutine_threadsafe(server.engine.abort(requests), handler.get_loop())
    _cancelling.add(cancelling)
    cancelling.add_done_callback(_cancelling.discard)


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
def reward_workers_of(worker_class: Any) -> Iterator[None]:
    """Let verl make its reward workers of `worker_class` in this block.

    Symptom: none; there would be no place to say that Ray may start a reward worker again.
    Cause: `RewardLoopManager` (verl/experimental/reward_loop/reward_loop.py, 0.9.1, l.272) names the class that it
    makes them of, and starts them, in its constructor.
    Delete when: verl takes the class, or the options of its actors, from the configuration.

    Args:
        worker_class: Ray's actor class of a `RewardLoopWorker`, with its options.
    """
    from verl.experimental.reward_loop import RewardLoopManager

    start = RewardLoopManager._init_reward_loop_workers

    def start_others(self: Any) -> None:
        self.reward_loop_workers_class = worker_class
        start(self)

    RewardLoopManager._init_reward_loop_workers = start_others
    try:
        yield
    finally:
        RewardLoopManager._init_reward_loop_workers = start


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
        load_critics_without_flash_attention,
        replaces="verl.utils.model.load_valuehead_model",
        scope=Scope.CPU,
        after="verl.utils.model",
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
        remember_what_loads_the_weights,
        replaces=f"{_ROLLOUT}.vllm_rollout.ServerAdapter._execute_method",
        scope=Scope.CPU,
        after=f"{_ROLLOUT}.vllm_rollout",
    ),
    Patch(
        fail_with_the_engine,
        replaces=f"{_ROLLOUT}.bucketed_weight_transfer.BucketedWeightSender._init_socket",
        scope=Scope.CPU,
        after=f"{_ROLLOUT}.bucketed_weight_transfer",
    ),
    Patch(
        waiting_requests,
        replaces=f"{_ROLLOUT}.vllm_async_server.vLLMHttpServer.abort_all_requests",
        scope=Scope.PUSH,
    ),
    Patch(
        cancel,
        replaces=f"{_ROLLOUT}.vllm_async_server.vLLMHttpServer.abort_request",
        scope=Scope.CANCELLING,
    ),
    Patch(
        quiet_separate_setup,
        replaces="verl.trainer.ppo.v1.trainer_separate_async.logger",
        scope=Scope.SEPARATE_MODES,
    ),
    Patch(
        reward_workers_of,
        replaces="verl.experimental.reward_loop.RewardLoopManager._init_reward_loop_workers",
        scope=Scope.SETUP,
    ),
    Patch(
        around_optimizer_step,
        replaces="verl.workers.engine.base.BaseEngine.optimizer_step",
        scope=Scope.STEP_SCALE,
    ),
)
