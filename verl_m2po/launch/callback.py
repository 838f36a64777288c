"""What happens on the driver around the job, called by Hydra: the preflight before it, and signals while it runs."""

import logging
import threading
from collections.abc import Iterator
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from verl_m2po.cpu import environment
from verl_m2po.ground import logs
from verl_m2po.ground.problem import Problem
from verl_m2po.launch.checks import devices, inputs, keys, losses, machine, room, staleness
from verl_m2po.launch.signals import Listener
from verl_m2po.losses import requirements

logger = logging.getLogger(__name__)


class PreflightCallback(Callback):
    """Refuses a run that cannot do what its config says.

    Hydra turns an exception of a callback into a warning, so a refusal leaves as ``SystemExit``: one message, no
    traceback, exit status 1.
    """

    def __init__(self) -> None:
        self._listener: Listener | None = None

    def on_run_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Give a single run the room that its staleness needs; called by Hydra before it passes `config` on."""
        room.make_room(config)

    def on_job_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Check `config`; called by Hydra before the job."""
        # A misspelt key of ours is why a run may seem to be none of our business.
        found = list(keys.problems(config))
        if uses_this_package(config):
            found += problems(config)
        for problem in found:
            if not problem.is_fatal:
                logger.warning("%s", problem)
        fatal = [problem for problem in found if problem.is_fatal]
        if fatal:
            raise SystemExit("\n".join(["verl-m2po refuses this run:", *(f"  - {problem}" for problem in fatal)]))
        if uses_this_package(config):
            logs.keep_earlier(logs.path_of(config))
        if staleness.is_chosen(config) and threading.current_thread() is threading.main_thread():
            self._listener = Listener()
            self._listener.start()

    def on_job_end(self, job_return: JobReturn, **_kwargs: Any) -> None:
        """Leave nothing behind, and end as a signal asks for; called by Hydra after the job, failed or not."""
        if self._listener is not None:
            # An error says more than a status: Hydra raises it after this.
            self._listener.stop(tell_status=job_return.status == JobStatus.COMPLETED)


def uses_this_package(config: DictConfig) -> bool:
    """Return whether `config` asks for anything of ours; verl's other runs are none of our business."""
    return (
        OmegaConf.select(config, requirements.POLICY_LOSS) is not None
        or requirements.names_a_method(config)
        or OmegaConf.select(config, "trainer.device") == environment.PLATFORM_NAME
        or staleness.is_chosen(config)
        or bool(OmegaConf.select(config, requirements.STEP_SCALE))
        or bool(OmegaConf.select(config, requirements.DIAGNOSTICS))
    )


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield every problem of `config`, the cheapest to look for first."""
    yield from losses.problems(config)
    yield from staleness.problems(config)
    yield from inputs.problems(config)
    yield from devices.problems(config)
    yield from machine.problems(config)
