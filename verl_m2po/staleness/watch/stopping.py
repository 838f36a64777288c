"""What is saved when a run that is asked to end can end: a step, or a validation, is not interrupted in vain."""

import logging
from collections.abc import Callable

from verl_m2po.staleness.watch.stop import StopRequest, StopRequested

logger = logging.getLogger(__name__)


class Stopping:
    """Decides, where the trainer passes by, whether the run ends here and which checkpoint is still to be written.

    Args:
        request: whether the run was asked to end.
        saved_step: the last trainer step that is on disk; 0 if none is.
    """

    def __init__(self, request: StopRequest, saved_step: Callable[[], int]) -> None:
        self.request = request
        self._saved_step = saved_step
        self._begun_step = 0

    def begin(self, step: int) -> None:
        """Trainer step `step` has taken rollouts to train on."""
        self._begun_step = step

    def ends_after(self, step: int, save: Callable[[], None]) -> bool:
        """Whether the run ends once trainer step `step` has made its updates; if so, it is saved.

        Args:
            save: writes the checkpoint of `step`; called only if there is none.
        """
        if not self.request.is_made():
            return False
        if self._saved_step() < step:
            save()
        return True

    def validate(
        self, step: int, validate: Callable[[], dict[str, float]], end: Callable[[], bool]
    ) -> dict[str, float]:
        """The metrics of a validation after `step`; none if the run is asked to end before it, or meanwhile.

        Args:
            validate: verl's, which raises `StopRequested` where it waits in vain.
            end: ends the run, saved, if it was asked to end.
        """
        if not self._begun_step:  # verl validates before training: there is nothing to save
            return validate()
        if end():
            return {}
        try:
            metrics = validate()
        except StopRequested as stop:
            logger.warning("the validation after trainer step %d is given up: %s", step, stop)
            metrics = {}
        end()
        return metrics

    def step_to_save(self, step: int, stop: StopRequested) -> int | None:
        """Which checkpoint is to be written when the rollouts that `step` needs did not come in time; None for none.

        A step without a batch has changed nothing: the checkpoint is that of the step before, with the rollouts that
        have been generated since.
        """
        logger.warning("%s", stop)
        saved = self._saved_step()
        if saved == step:
            return None  # only the push of its weights was still to come
        if self._begun_step == step:
            logger.warning(
                "trainer step %d is lost: it waits for rollouts that only its own weights can generate. The last "
                "checkpoint is that of step %d",
                step,
                saved,
            )
            return None
        return step - 1 if saved < step - 1 else None
