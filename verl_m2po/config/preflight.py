"""Checks of a composed config before anything slow starts, called by Hydra on the driver."""

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class PreflightCallback(Callback):
    """Refuses a run that cannot do what its config says.

    Hydra turns an exception of a callback into a warning, so a refusal leaves as ``SystemExit``: one message, no
    traceback, exit status 1.
    """

    def on_job_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Check `config`; called by Hydra before the job."""
