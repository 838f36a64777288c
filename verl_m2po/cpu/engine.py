"""verl's FSDP2 engines, registered for the CPU."""

from contextlib import contextmanager
from typing import Any

import torch
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead


class _OnCPU:
    """Keeps parameters where they are: they live on the CPU already.

    verl gives an engine that only infers (the reference policy) ``CPUOffloadPolicy(pin_memory=True)``, and pinning
    needs a GPU driver.
    """

    engine_config: Any

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        with _as_training_engine(self.engine_config):
            return super()._build_fsdp_module(module)  # type: ignore[misc]


@contextmanager
def _as_training_engine(engine_config: Any):
    """Hide ``forward_only`` while the module is wrapped, which is what selects the offload policy."""
    forward_only = engine_config.forward_only
    engine_config.forward_only = False
    try:
        yield
    finally:
        engine_config.forward_only = forward_only


@EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device="cpu")
class CPUEngineWithLMHead(_OnCPU, FSDPEngineWithLMHead):
    """verl's FSDP2 language-model engine on the CPU."""


@EngineRegistry.register(model_type="value_model", backend=["fsdp2"], device="cpu")
class CPUEngineWithValueHead(_OnCPU, FSDPEngineWithValueHead):
    """verl's FSDP2 critic engine on the CPU."""
