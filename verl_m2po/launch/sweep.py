"""Sweeps with Hydra's --multirun: verl's main, made for one run in a process, called for one job after the other."""

import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from verl_m2po.ground.problem import Problem
from verl_m2po.launch.callback import uses_this_package

LOG_PATH = "VERL_FILE_LOGGER_PATH"
NAME = "trainer.experiment_name"


class SweepCallback(Callback):
    """Keeps the jobs of a sweep apart: each has a name, a log and a Ray of its own. Single runs are left alone."""

    def __init__(self) -> None:
        self._folders: set[Path] = set()

    def on_job_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Refuse a job that would write over an earlier one; called by Hydra before the job."""
        if not _is_sweep() or not uses_this_package(config) or not _writes_by_name(config):
            return
        names = [str(OmegaConf.select(config, f"trainer.{part}_name")) for part in ("project", "experiment")]
        if problem := problem_of(Path(*names), self._folders):
            raise SystemExit(f"verl-m2po refuses this job of the sweep:\n  - {problem}")
        self._folders.add(Path(*names))

    def on_job_end(self, config: DictConfig, **_kwargs: Any) -> None:
        """End the job's Ray, which verl leaves to the end of the process; called by Hydra after the job, failed or not.

        The next job would find the names of this one's placement groups taken, and its workers still in memory.
        """
        if not _is_sweep() or not uses_this_package(config):
            return
        import ray

        ray.shutdown()


def problem_of(folder: Path, earlier: set[Path]) -> Problem | None:
    """Why the job that logs to `folder` would spoil what the `earlier` ones left; None if it would not.

    Args:
        folder: project and experiment name: the end of the paths of verl's log and checkpoints.
        earlier: Those of the jobs before it.
    """
    if path := os.environ.get(LOG_PATH):
        return Problem(
            LOG_PATH,
            path,
            "every job of the sweep would write its log there, over that of the job before",
            f"Unset it; VERL_FILE_LOGGER_ROOT=<folder> gives each job <folder>/<project>/<{NAME}>.jsonl",
        )
    if folder in earlier:
        return Problem(
            NAME,
            folder.name,
            "an earlier job of the sweep has this name too, so this one would write over its log and go on from its "
            "checkpoints",
            f"Put what is swept over into the name, for example {NAME}='lr_${{actor_rollout_ref.actor.optim.lr}}'",
        )
    return None


def _writes_by_name(config: DictConfig) -> bool:
    """Whether the run writes a log or checkpoints to a path with its name in it."""
    loggers = OmegaConf.select(config, "trainer.logger") or []
    return "file" in loggers or (OmegaConf.select(config, "trainer.save_freq") or -1) > 0


def _is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
