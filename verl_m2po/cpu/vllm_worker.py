"""The extension of vLLM's CPU worker under verl: weights that can be loaded again after every sync."""

from typing import Any

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from verl_m2po.patches import vllm as vllm_patches


class CPUWorkerExtension(vLLMColocateWorkerExtension):
    """verl's worker extension, chosen by ``rollout.engine_kwargs.vllm.worker_extension_cls``."""

    def __new__(cls, **kwargs: Any) -> "CPUWorkerExtension":
        vllm_patches.keep_linear_weights()
        return super().__new__(cls, **kwargs)
