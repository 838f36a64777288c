"""End-to-end runs: real Ray, TransferQueue, FSDP and vLLM, a handful of small steps each."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cpu_run
import pytest

# What says nothing about a run: verl draws a free port for torch's store and binds it half a minute later, when another
# run may have it; Ray gives its node 30 s to start, which a busy machine may not have.
NEVER_BEGAN = ("EADDRINUSE", "The current node timed out during startup")


@pytest.fixture
def train(tmp_path: Path, tiny: Path, addition: Path) -> Callable[..., cpu_run.Result]:
    """Train the tiny model on addition: 8 prompts x 4 responses a step, two optimizer updates a step."""

    def run_once(*overrides: str, **kwargs: object) -> cpu_run.Result:
        return cpu_run.run_main(
            tmp_path,
            f"actor_rollout_ref.model.path={tiny}",
            f"data.train_files={addition / 'train.parquet'}",
            f"data.val_files={addition / 'validation.parquet'}",
            "data.train_batch_size=8",
            "actor_rollout_ref.actor.ppo_mini_batch_size=4",
            "actor_rollout_ref.rollout.n=4",
            "trainer.val_before_train=false",
            "trainer.test_freq=-1",
            *overrides,
            **kwargs,
        )

    def run(*overrides: str, status: int = 0, **kwargs: object) -> cpu_run.Result:
        result = run_once(*overrides, **kwargs)
        if not result.steps and any(cause in result.output for cause in NEVER_BEGAN):
            result = run_once(*overrides, **kwargs)
        assert result.status == status, result.tail
        return result

    return run


@pytest.fixture(scope="session")
def seeing() -> dict[str, str]:
    """The environment of processes that read images: torchvision is apart, for the others would import it as well."""
    packages = Path(sys.prefix) / "vision"
    assert packages.is_dir(), f"{packages} is missing: `make env` makes it"
    shim = Path(__file__).parents[1] / "vision"
    return {"PYTHONPATH": os.pathsep.join([str(shim), str(packages), os.environ["PYTHONPATH"]])}


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory, seeing: dict[str, str]) -> Path:
    """A tiny vision-language model, which half knows the colours, and under `data` pictures and videos of squares."""
    folder = tmp_path_factory.mktemp("colours")
    subprocess.run([sys.executable, "-m", "tiny_vision", str(folder)], env={**os.environ, **seeing}, check=True)
    return folder
