"""Is there room for the rollouts that wait: memory, and entries of TransferQueue?"""

import logging
from collections.abc import Callable, Iterator

from omegaconf import DictConfig, OmegaConf

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.settings import Number
from verl_m2po.ground.verl_config import overridden_keys, read
from verl_m2po.staleness.checks.numbers import (
    PROMPT_LENGTH,
    RESPONSE_LENGTH,
    RESPONSES,
    SAVE_FREQ,
    TOTAL_STEPS,
    TRAIN_BATCH_SIZE,
    mode_and_settings,
    staleness_steps,
)
from verl_m2po.staleness.config import BoundedAsyncConfig, is_chosen
from verl_m2po.staleness.rows.codec import (
    BYTES_PER_PROMPT_TOKEN,
    BYTES_PER_RESPONSE_TOKEN,
    UNPACKED_BYTES_PER_PROMPT_TOKEN,
    UNPACKED_BYTES_PER_RESPONSE_TOKEN,
)
from verl_m2po.staleness.rule.units import UpdateClock

logger = logging.getLogger(__name__)

CAPACITY = Number(
    "transfer_queue.backend.SimpleStorage.total_storage_size", 1, may_be_null=True, meaning="entries of TransferQueue"
)

ROW_OVERHEAD_BYTES = 6144
"""What one trajectory costs besides its tokens: Python fields, TransferQueue's records, its share of the prompt.

Measured 4 to 5 kB in the storage process (docs/benchmarks.md, "Taking a batch out").
"""


def _steps_between_checkpoints(config: DictConfig) -> int:
    """0 where the run writes none of its own accord."""
    return max(0, SAVE_FREQ.of(config))


def _replayed_batches(config: DictConfig) -> int:
    """Batches that a journal puts back at once, beyond those that waited at the checkpoint: one a step since then.

    A run without checkpoints begins again, with all of its steps.
    """
    if not mode_and_settings(config)[1].journal:
        return 0
    return _steps_between_checkpoints(config) or TOTAL_STEPS.of(config) or 0


def _clock(config: DictConfig) -> UpdateClock:
    return staleness_steps(config)[0]


def _held_batches(config: DictConfig, staleness_steps: int) -> int:
    """Batches that wait for their first use, and those that were trained and may be again.

    The mode replay generates a batch when it trains one, so that together they are no more than its window has steps.
    """
    settings, kept = mode_and_settings(config)[1], staleness_steps + 1
    if not isinstance(settings, BoundedAsyncConfig) or not settings.reuses:
        return kept
    return settings.ahead_steps(_clock(config)) + 1 + kept


def _unpacked_bytes(config: DictConfig, image_bytes: int) -> int:
    """Of a batch that is unpacked while the one before trains: there each row has its images."""
    if not mode_and_settings(config)[1].prefetch:
        return 0
    response_bytes = RESPONSE_LENGTH.of(config) * UNPACKED_BYTES_PER_RESPONSE_TOKEN
    prompt_bytes = PROMPT_LENGTH.of(config) * (UNPACKED_BYTES_PER_PROMPT_TOKEN + image_bytes)
    return TRAIN_BATCH_SIZE.of(config) * RESPONSES.of(config) * (response_bytes + prompt_bytes + ROW_OVERHEAD_BYTES)


def estimate_buffer_bytes(config: DictConfig, staleness_steps: int, image_bytes: int = 0) -> int:
    """Memory for the waiting rollouts if every response has its full length, in bytes.

    staleness_steps + 1 batches wait at most, the next one unpacked beside them, and with a journal as many more as
    there are steps from one checkpoint to the next; see codec.py for the price of a token. Without checkpoints a long
    run would need more than any machine has, for a crash that may never come: that is not counted.

    Args:
        staleness_steps: the age of the oldest batch in trainer steps.
        image_bytes: of a prompt's token if it is one of an image, which is stored once for all responses; 0 without.
    """
    replayed = _steps_between_checkpoints(config) if mode_and_settings(config)[1].journal else 0
    batches = _held_batches(config, staleness_steps) + replayed
    response_bytes = RESPONSE_LENGTH.of(config) * BYTES_PER_RESPONSE_TOKEN
    prompt_bytes = PROMPT_LENGTH.of(config) * BYTES_PER_PROMPT_TOKEN
    of_group = RESPONSES.of(config) * (response_bytes + prompt_bytes + ROW_OVERHEAD_BYTES)
    of_group += PROMPT_LENGTH.of(config) * image_bytes
    return batches * TRAIN_BATCH_SIZE.of(config) * of_group + _unpacked_bytes(config, image_bytes)


def buffer_rows(config: DictConfig, staleness_steps: int) -> int:
    """Entries that TransferQueue must hold: staleness_steps + 1 batches that wait and the one that is trained.

    What a journal puts back after a crash is among them, and a batch that is unpacked ahead. An entry is a prompt or a
    response; validation comes on top.
    """
    ahead = int(mode_and_settings(config)[1].prefetch)
    batches = _held_batches(config, staleness_steps) + 1 + ahead + _replayed_batches(config)
    return batches * TRAIN_BATCH_SIZE.of(config) * (1 + RESPONSES.of(config))


def _waiting(staleness_steps: int, replayed: int) -> str:
    waiting = f"{staleness_steps + 1} batches of rollouts wait"
    return f"{waiting} and after a crash up to {replayed} more from the journal" if replayed else waiting


def fits(
    config: DictConfig, available_memory_bytes: int | None, images: Callable[[DictConfig], int]
) -> Iterator[Problem]:
    """Yield a staleness whose waiting rollouts could need more memory than there is.

    Args:
        available_memory_bytes: of the machine, half of which the rollouts may take; None: unknown.
        images: bytes of a prompt's token if it is one of an image.
    """
    mode, settings = mode_and_settings(config)
    limit_gib = settings.buffer_memory_limit_gib
    if limit_gib is None and available_memory_bytes is not None:
        limit_gib = available_memory_bytes / 2 / 2**30
    if limit_gib is None or read(config, "transfer_queue.backend.SimpleStorage.ssd_offload.enabled"):
        return
    _, steps = staleness_steps(config)
    image_bytes = images(config)
    need_gib = estimate_buffer_bytes(config, steps, image_bytes) / 2**30
    if need_gib <= limit_gib:
        return
    replayed = _steps_between_checkpoints(config) if settings.journal else 0
    seen = ", if all of a prompt is image" if image_bytes else ""
    yield Problem(
        f"trainer.v1.{mode}.staleness_updates",
        settings.staleness_updates,
        f"{_waiting(steps, replayed)}, which needs up to {need_gib:.1f} GiB at full length{seen}; the limit is "
        f"{limit_gib:.1f} GiB",
        "Let TransferQueue keep them on disk "
        "(+transfer_queue.backend.SimpleStorage.ssd_offload.enabled=true, +<the same>.path=<folder>, "
        f"+<the same>.threshold_bytes=1024), raise trainer.v1.{mode}.buffer_memory_limit_gib, or lower the "
        f"staleness{' or trainer.save_freq' if replayed else ''}",
    )


def has_entries(config: DictConfig) -> Iterator[Problem]:
    """Yield a limit of TransferQueue's that is lower than the entries that the mode needs."""
    capacity = CAPACITY.of(config)
    if capacity is None:
        return
    _, steps = staleness_steps(config)
    need = buffer_rows(config, steps)
    if need > capacity:
        waiting = _waiting(steps, _replayed_batches(config))
        why = f"{waiting}, which are up to {need} entries with the one that is trained"
        yield Problem(CAPACITY.key, capacity, why, "Set it to null: no limit. Their memory is checked by itself")


def make_room(config: DictConfig) -> None:
    """Lift verl's limit on TransferQueue's entries in `config`, in place, where the staleness needs more of them.

    verl starts TransferQueue before the trainer mode could ask for it. With a journal always: a restart puts back at
    once what was generated since the last checkpoint, and how long a run without checkpoints is, the data set may
    decide. A limit that stands on the command line stays, and is refused by the preflight if it is too small.

    Args:
        config: The composed config of a run, with Hydra's own section.
    """
    if not is_chosen(config) or CAPACITY.key in overridden_keys(config):
        return
    try:
        mode, settings = mode_and_settings(config)
        capacity = CAPACITY.of(config)
        needs_room = settings.journal or buffer_rows(config, staleness_steps(config)[1]) > (capacity or 0)
    except ValueError:
        return  # reported by the preflight
    if capacity is not None and needs_room:
        logger.warning(
            "trainer_mode=%s sets %s=null: %s entries may be too few for the rollouts", mode, CAPACITY.key, capacity
        )
        OmegaConf.update(config, CAPACITY.key, None)
