"""`make gpu-check`: what only a GPU can show. Without one, the parts that the processor can prove as well.

What was measured, and what could not run and why, stands at the end of the output.
"""

import importlib.util

import pytest
import torch

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])

MEASURED = pytest.StashKey[list[str]]()


@pytest.fixture(params=["cpu", GPU])
def device(request) -> str:
    """Where the part runs; the processor proves that the part itself works."""
    return request.param


@pytest.fixture
def measured(request) -> list[str]:
    """Lines for the end of the output."""
    return request.config.stash.setdefault(MEASURED, [])


@pytest.fixture
def two_gpus() -> None:
    """Skip unless runs of verl on two GPUs are possible."""
    missing = [name for name in ("ray", "vllm", "transfer_queue") if importlib.util.find_spec(name) is None]
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, here are {torch.cuda.device_count()}")
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def pytest_terminal_summary(terminalreporter, config) -> None:
    if lines := config.stash.get(MEASURED, []):
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)
