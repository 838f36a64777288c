"""verl's platform for machines without a GPU. Opt-in: it never claims a machine by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

from verl_m2po.cpu import environment
from verl_m2po.cpu.device_module import device_module


@PlatformRegistry.register(platform=environment.PLATFORM_NAME)
class PlatformCPU(PlatformBase):
    """Runs verl's workers on the CPU with gloo.

    Ray schedules them on *logical* GPUs (``ray_init.num_gpus``), because verl counts only resources named GPU or NPU
    when it checks that a run fits.
    """

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return device_module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        # verl takes the first platform that answers yes, and a cluster's head node often has no GPU.
        return False

    def current_device(self) -> str:  # type: ignore[override]
        # verl passes this to `Tensor.to`, where an index would mean cuda:0.
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        """There is one CPU."""

    def synchronize(self, device_index: int | None = None) -> None:
        """CPU work is done when the call returns."""

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """There is no caching allocator."""

    def empty_cache(self) -> None:
        """There is no caching allocator."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        # A private name: verl assigns device indices to it, and CUDA_VISIBLE_DEVICES would reach torch.
        return "M2PO_VISIBLE_CPU_SLOTS"

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        # Selects verl's shared-memory path for weights.
        return False

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        """There is no device profiler."""

    def profiler_stop(self) -> None:
        """There is no device profiler."""

    def cudart(self) -> Any:
        return None
