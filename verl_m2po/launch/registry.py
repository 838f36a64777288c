"""Every question that is asked of a config before a run, in the order of what it costs to answer."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
from omegaconf import DictConfig

from verl_m2po.ground.check import Check, ask_all
from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import TRAINER_MODE
from verl_m2po.launch.checks import (
    data,
    devices,
    effects,
    entry_point,
    images,
    inactive,
    keys,
    losses,
    machine,
    model,
    models,
    numbers,
    outputs,
    restarts,
    tools,
)
from verl_m2po.losses import requirements
from verl_m2po.staleness import checks

OF_ALL_RUNS = (
    Check("the names of keys", keys.problems, "hydra.overrides.task"),
    Check("settings of other trainer modes", inactive.problems, TRAINER_MODE),
)
"""Asked of verl's other runs too: a key of ours that is misspelt, or whose mode was forgotten, is why a run may seem to
be none of our business."""


def of_the_config(memory_bytes: int, main: Callable[..., Any] | None = None) -> Iterator[Check]:
    """The checks of runs that use this package that need the config alone; what files say is taken where they are.

    Args:
        memory_bytes: of the machine.
        main: the function that Hydra calls with the config; None: unknown.
    """
    prompts = partial(data.known_rows, key=data.TRAIN)
    yield Check("verl's numbers", numbers.problems, "trainer")
    yield Check("the entry point", partial(entry_point.problems, main=main), TRAINER_MODE)
    yield Check("the policy loss", losses.problems, "actor_rollout_ref.actor.policy_loss")
    yield Check("distillation", effects.distillation, effects.TASK_REWARDS)
    yield Check("the advantage estimator", effects.estimator, requirements.ESTIMATOR)
    yield Check("bypass mode", effects.bypassed, requirements.BYPASS)
    yield Check("the KL in the reward", effects.kl_in_reward, effects.KL_IN_REWARD)
    yield Check("the clip range", effects.clip, effects.CLIP)
    yield Check("router replay", effects.router_replay, effects.ROUTER_REPLAY)
    yield Check("images for a model of text", images.blind, model.PATH.key)
    yield Check("LoRA", models.lora, models.TARGETS)
    yield Check("LoRA beside a critic", models.adapters_beside_a_critic, models.ESTIMATOR)
    yield from checks.checks(memory_bytes, prompts, images.bytes_per_prompt_token)


def of_the_machine() -> Iterator[Check]:
    """The checks of what such a run finds where it starts: files, devices, an earlier run."""
    yield Check("the log", outputs.log, outputs.NAME.key)
    yield Check("restarts", restarts.problems, "trainer.v1")
    yield Check("the ledger", outputs.ledger, "trainer.v1")
    yield Check("the journal", outputs.journal, "trainer.v1")
    yield Check("the checkpoints", outputs.checkpoints, outputs.CHECKPOINTS.key)
    yield Check("the checkpoint to resume from", outputs.resumed, "trainer.resume_mode")
    yield Check("the model", model.exists, model.PATH.key)
    yield Check("the positions of the model", model.positions, model.PATH.key)
    yield Check("the processor of the model", images.processor, model.PATH.key)
    yield Check("the packages for images", images.packages, images.KEYS[0])
    yield Check("the normalization of images", images.normalization, images.LOAD_FORMAT)
    for key in (data.TRAIN, data.VALIDATION):
        yield Check(f"the files of {key}", partial(data.exist, key=key), key)
        yield Check(f"the columns of {key}", partial(data.columns, key=key), key)
    yield Check("the size of the training data", data.batch, data.TRAIN)
    yield Check("the size of the validation data", data.validation, data.VALIDATION)
    yield Check("long prompts", data.overlong, data.FILTER)
    yield Check("the tools", tools.config, tools.CONFIG.key)
    yield Check("the tool functions", tools.functions, tools.FUNCTIONS.key)
    yield Check("the devices", devices.problems, "trainer.device")
    yield Check("this machine", machine.problems, "trainer.device")


def problems(config: DictConfig, is_ours: bool, main: Callable[..., Any] | None = None) -> list[Problem]:
    """Everything that is wrong with `config`.

    Args:
        config: the composed config of a job, with Hydra's own section.
        is_ours: whether it uses this package.
        main: the function that Hydra calls with it; None: unknown.
    """
    ours = [*of_the_config(psutil.virtual_memory().total, main), *of_the_machine()] if is_ours else []
    return ask_all([*OF_ALL_RUNS, *ours], config)
