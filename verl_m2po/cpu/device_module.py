"""``torch.cpu`` with the calls that verl makes on ``torch.cuda``: memory counters, caches, random state."""

import os
import types
from typing import Any

import psutil
import torch

_PROCESS = psutil.Process(os.getpid())


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stand in for calls that have no meaning without a device cache."""


def _resident_bytes(*_args: Any) -> int:
    return _PROCESS.memory_info().rss


def _memory_info(*_args: Any) -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total


class CPUDeviceModule(types.ModuleType):
    """What verl gets where it asks for ``torch.<device>``.

    Everything that torch.cpu has is torch.cpu's. Memory counters report this process's resident memory in bytes, so
    that ``perf/max_memory_allocated_gb`` means something.
    """

    empty_cache = staticmethod(_nothing)
    ipc_collect = staticmethod(_nothing)
    reset_peak_memory_stats = staticmethod(_nothing)
    manual_seed = staticmethod(torch.manual_seed)
    manual_seed_all = staticmethod(torch.manual_seed)
    memory_allocated = staticmethod(_resident_bytes)
    memory_reserved = staticmethod(_resident_bytes)
    max_memory_allocated = staticmethod(_resident_bytes)
    max_memory_reserved = staticmethod(_resident_bytes)
    mem_get_info = staticmethod(_memory_info)

    def set_device(self, _index: object) -> None:
        """Accept verl's choice of a device index: there is one CPU."""

    def get_device_name(self, *_args: Any) -> str:
        """Return the name that verl's FLOPS table looks up."""
        return "cpu"

    def get_rng_state(self, *_args: Any) -> torch.Tensor:
        """Return torch's CPU random state."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *_args: Any) -> None:
        """Set torch's CPU random state."""
        torch.set_rng_state(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


device_module = CPUDeviceModule("torch.cpu")
