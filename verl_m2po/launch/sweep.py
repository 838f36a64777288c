"""Sweeps with Hydra's --multirun: verl's main, made for one run in a process, called for one job after the other."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override

from verl_m2po.ground import logs
from verl_m2po.ground.overrides import override
from verl_m2po.ground.problem import Problem
from verl_m2po.launch.callback import Refused, uses_this_package

logger = logging.getLogger(__name__)

LOG_PATH = "VERL_FILE_LOGGER_PATH"
NAME = "trainer.experiment_name"
SEED = "data.seed"
LAUNCHER = "hydra.launcher._target_"
HYDRAS_LAUNCHER = f"{BasicLauncher.__module__}.{BasicLauncher.__name__}"
OUR_LAUNCHER = "hydra_plugins.verl_m2po.SweepLauncher"


class Job(NamedTuple):
    """What tells one job of a sweep from another.

    Args:
        overrides: of its command line, by key.
        folder: project and experiment name, the end of the paths of verl's log and checkpoints; None if it writes none.
    """

    overrides: dict[str, str]
    folder: Path | None


class SweepCallback(Callback):
    """Runs the jobs of a sweep apart from each other: by `SweepLauncher`, and each with a Ray of its own."""

    def on_multirun_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Let `SweepLauncher` run the jobs where Hydra's own would; called by Hydra before it looks for a launcher."""
        if OmegaConf.select(config, LAUNCHER) == HYDRAS_LAUNCHER:
            with flag_override(config, ["readonly", "struct"], False):
                OmegaConf.update(config, LAUNCHER, OUR_LAUNCHER)

    def on_job_end(self, config: DictConfig, **_kwargs: Any) -> None:
        """End the job's Ray, which verl leaves to the end of the process; called by Hydra after the job, failed or not.

        The next job would find the names of this one's placement groups taken, and its workers still in memory.
        """
        if not _is_sweep() or not uses_this_package(config):
            return
        import ray

        ray.shutdown()


class SweepLauncher(BasicLauncher):
    """Hydra's launcher for jobs in this process, that looks at all of them first and survives the refusal of one."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs one after the other.

        Raises:
            Refused: jobs would write over each other, and none has started; or some were refused, and all others ran.
        """
        job_overrides = [self._named(overrides) for overrides in job_overrides]
        if problem := collision([self._job(overrides) for overrides in job_overrides]):
            raise Refused(f"verl-m2po refuses this sweep, before its first job:\n  - {problem}")
        returns: list[JobReturn] = []
        refused: list[str] = []
        for index, overrides in enumerate(job_overrides, start=initial_job_idx):
            try:
                returns += super().launch([overrides], index)
            except Refused as refusal:
                logger.error("job %d of the sweep is left out. %s", index, refusal)
                refused.append(f"#{index}: {' '.join(overrides)}")
        if refused:
            raise Refused("\n  - ".join(["verl-m2po has refused these jobs of the sweep, see above:", *refused]))
        return returns

    def _named(self, overrides: Sequence[str]) -> list[str]:
        """The default name says the loss and the staleness: where the seed is swept over, it says that too."""
        keys = _by_key(overrides)
        config = self._config_of(overrides)
        if SEED not in keys or NAME in keys or not uses_this_package(config):
            return list(overrides)
        name = str(OmegaConf.select(config, NAME))
        seed = f"seed{keys[SEED]}"
        return [*overrides, *([] if seed in name else [override(NAME, f"{name}_{seed}")])]

    def _job(self, overrides: Sequence[str]) -> Job:
        config = self._config_of(overrides)
        return Job(_by_key(overrides), _folder(config) if uses_this_package(config) else None)

    def _config_of(self, overrides: Sequence[str]) -> DictConfig:
        assert self.hydra_context is not None and self.config is not None
        return self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))


def collision(jobs: Sequence[Job]) -> Problem | None:
    """Why one of `jobs` would spoil what another leaves; None if none would."""
    writing = [job for job in jobs if job.folder is not None]
    if writing and len(jobs) > 1 and (path := os.environ.get(LOG_PATH)):
        return Problem(
            LOG_PATH,
            path,
            "every job of the sweep would write its log there, over that of the job before",
            f"Unset it; VERL_FILE_LOGGER_ROOT=<folder> gives each job <folder>/<project>/<{NAME}>.jsonl",
        )
    for number, job in enumerate(writing):
        for earlier in writing[:number]:
            if job.folder == earlier.folder:
                return _same_name(job, earlier)
    return None


def _same_name(job: Job, earlier: Job) -> Problem:
    assert job.folder is not None
    keys = {*job.overrides, *earlier.overrides}
    differing = sorted(key for key in keys if job.overrides.get(key) != earlier.overrides.get(key))
    swept = ", ".join(differing) or "nothing"
    example = differing[0] if differing else "data.seed"
    return Problem(
        NAME,
        job.folder.name,
        f"two jobs of the sweep have this name and differ in {swept} only, so one would write over the log of the "
        "other and go on from its checkpoints",
        f"Put what is swept over into the name: {NAME}='<name>_${{{example}}}'",
    )


def _by_key(overrides: Sequence[str]) -> dict[str, str]:
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {override.get_key_element().lstrip("+~"): override.get_value_element_as_str() for override in parsed}


def _folder(config: DictConfig) -> Path | None:
    """Project and experiment name of a run that writes a log or checkpoints under them; None if it writes neither."""
    save_freq = OmegaConf.select(config, "trainer.save_freq")
    if not logs.are_files(config) and not (isinstance(save_freq, int) and save_freq > 0):
        return None
    return Path(*(str(OmegaConf.select(config, f"trainer.{part}_name")) for part in ("project", "experiment")))


# Hydra makes no plugin whose name begins otherwise, and finds none by itself in every kind of editable install.
Plugins.instance().class_name_to_class[OUR_LAUNCHER] = SweepLauncher


def _is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
