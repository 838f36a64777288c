"""What happens on the driver around the job, called by Hydra: the preflight before it, and signals while it runs."""

import logging
import threading
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import TaskFunction
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from verl_m2po import patches
from verl_m2po.cpu import environment
from verl_m2po.ground import logs
from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import read
from verl_m2po.launch import again, failure, registry
from verl_m2po.launch.signals import Listener
from verl_m2po.losses import requirements
from verl_m2po.staleness.account.summary import print_summary
from verl_m2po.staleness.checks import memory
from verl_m2po.staleness.config import is_chosen

logger = logging.getLogger(__name__)


class PreflightCallback(Callback):
    """Refuses a run that cannot do what its config says.

    Hydra turns an exception of a callback into a warning, so a refusal leaves as ``SystemExit``: one message, no
    traceback, exit status 1.
    """

    def __init__(self) -> None:
        self._listener: Listener | None = None
        self._config: DictConfig | None = None
        self._warnings: list[str] = []

    def on_run_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Give a single run the room that its staleness needs; called by Hydra before it passes `config` on."""
        memory.make_room(config)

    def on_job_start(self, config: DictConfig, task_function: TaskFunction | None = None, **_kwargs: Any) -> None:
        """Check `config`; called by Hydra before the job, which is a call of `task_function`."""
        is_ours = uses_this_package(config)
        self._warnings = require_none(registry.problems(config, is_ours, task_function))
        # First of what follows: it depends on nothing, and a run that cannot be ended is worse than one without a log.
        if is_chosen(config) and threading.current_thread() is threading.main_thread():
            self._listener = Listener()
            self._listener.start()
        self._config = config if is_ours else None
        if is_ours:
            _keep_earlier_log(config)
            print_summary(config)
        if read(config, "trainer.device") == environment.PLATFORM_NAME:
            # verl's own checks of a config with adapters ask for vLLM on the driver.
            patches.install(on_cpu=True)

    def on_job_end(self, job_return: JobReturn, **_kwargs: Any) -> None:
        """Leave nothing behind, and end as a signal asks for; called by Hydra after the job, failed or not."""
        has_failed = job_return.status == JobStatus.FAILED
        try:
            # While Ray still answers.
            attempts = self._attempts_if_it_goes_on() if has_failed else None
        finally:
            if self._listener is not None:
                # An error says more than a status: Hydra raises it after this.
                self._listener.stop(tell_status=job_return.status == JobStatus.COMPLETED)
        if has_failed and self._config is not None:
            failure.say(self._config, job_return._return_value, self._warnings, at_once=attempts is not None)
            if attempts is not None:
                again.start_again(self._config, attempts)

    def _attempts_if_it_goes_on(self) -> again.Attempts | None:
        """The attempts of this command, if it starts again after this one, which failed; None if it ends."""
        if self._config is None or self._listener is None or self._listener.received is not None:
            return None
        if not (allowed := again.allowed(self._config)):
            return None
        before, step = again.Attempts.read(), again.failed_step(self._config)
        if not before.failed_at and not step:
            return None  # it has not begun to train: nothing says that it ever would
        if (reason := before.why_not(allowed, step)) is not None:
            logger.warning("the run is not restarted: %s", reason)
            return None
        attempts = before.after(step)
        number = len(attempts.failed_at)
        logger.warning("restart %d of %d: the run failed at trainer step %d", number, allowed, step)
        return attempts


class Refused(SystemExit):
    """A run that is not started: its message is all that Hydra prints, its status is 1."""


def require_none(problems: list[Problem]) -> list[str]:
    """Warn of what is odd, refuse what is wrong.

    Returns:
        The warnings.

    Raises:
        Refused: with every fatal problem.
    """
    warnings = [str(problem) for problem in problems if not problem.is_fatal]
    for warning in warnings:
        logger.warning("%s", warning)
    if fatal := [problem for problem in problems if problem.is_fatal]:
        raise Refused("\n".join(["verl-m2po refuses this run:", *(f"  - {problem}" for problem in fatal)]))
    return warnings


def _keep_earlier_log(config: DictConfig) -> None:
    try:
        logs.keep_earlier(logs.path_of(config))
    except OSError as error:
        # As an exception it would be a warning of Hydra's, and verl would empty the log.
        raise Refused(f"verl-m2po refuses this run: the log of an earlier attempt cannot be moved ({error})") from error


def uses_this_package(config: DictConfig) -> bool:
    """Return whether `config` asks for anything of ours; verl's other runs are none of our business.

    One that cannot be read as far as that is taken for ours: its checks say what is wrong.
    """
    try:
        return (
            read(config, requirements.POLICY_LOSS) is not None
            or requirements.names_a_method(config)
            or read(config, "trainer.device") == environment.PLATFORM_NAME
            or is_chosen(config)
            or bool(read(config, requirements.STEP_SCALE))
            or bool(read(config, requirements.DIAGNOSTICS))
        )
    except (OmegaConfBaseException, TypeError, AttributeError):
        return True
