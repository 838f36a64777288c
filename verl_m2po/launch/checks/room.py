"""What verl starts before the trainer mode could ask for it: TransferQueue, which holds the rollouts that wait."""

import logging

from omegaconf import DictConfig, OmegaConf

from verl_m2po.launch.checks import staleness
from verl_m2po.staleness import checks
from verl_m2po.staleness.config import load_mode_config

logger = logging.getLogger(__name__)

CAPACITY = "transfer_queue.backend.SimpleStorage.total_storage_size"


def make_room(config: DictConfig) -> None:
    """Lift verl's limit on TransferQueue's entries in `config`, in place, where the staleness needs more of them.

    With a journal always: a restart puts back at once what was generated since the last checkpoint, and how long a run
    without checkpoints is, the data set may decide. A limit that stands on the command line stays, and is refused by
    the preflight if it is too small.

    Args:
        config: The composed config of a run, with Hydra's own section.
    """
    if not staleness.is_chosen(config) or _is_the_users(config):
        return
    capacity = OmegaConf.select(config, CAPACITY)
    mode = config.trainer.v1.trainer_mode
    try:
        steps = checks.make_clock(config).steps(load_mode_config(config, mode).staleness_updates)
        needs_room = checks.keeps_a_journal(config) or checks.buffer_rows(config, steps) > (capacity or 0)
    except ValueError:
        return  # reported by the preflight
    if capacity is not None and needs_room:
        logger.warning(
            "trainer_mode=%s sets %s=null: %s entries may be too few for the rollouts", mode, CAPACITY, capacity
        )
        OmegaConf.update(config, CAPACITY, None)


def _is_the_users(config: DictConfig) -> bool:
    overrides = OmegaConf.select(config, "hydra.overrides.task") or []
    return any(override.lstrip("+").startswith(f"{CAPACITY}=") for override in overrides)
