"""Can the trainer mode keep and push what this kind of model needs?"""

import re
from collections.abc import Iterator

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import TRAINER_MODE, overridden_keys, read
from verl_m2po.launch.checks import data, model
from verl_m2po.staleness.config import SEPARATE_MODES, is_chosen

TOWERS = ("vision_config", "audio_config", "thinker_config")
"""Sections of a model's config.json that say it takes more than text."""

NAMED_FOR_IMAGES = re.compile(r"(?i)(?:^|[-_.])(?:VL\d*|[\d.]+V|omni|vision|llava|pixtral|internvl\d*)(?=[-_.]|$)")
"""Names of models that say it: what is not on this machine has no config.json to ask."""

IMAGE_KEYS = ("data.image_key", "data.video_key", "data.audio_key")
MERGE = "actor_rollout_ref.model.lora.merge"
LORA = ("actor_rollout_ref.model.lora_rank", "actor_rollout_ref.model.lora.rank")
ADAPTER = "actor_rollout_ref.model.lora_adapter_path"


def more_than_text(config: DictConfig) -> Iterator[Problem]:
    """Yield a model or data with images, video or sound in a mode that keeps text only."""
    if not is_chosen(config):
        return
    mode = read(config, TRAINER_MODE)
    why = f"the mode {mode} keeps text only, and the first response with images or multi-axis positions ends the run"
    remedy = f"Take a model and data of text, or one of verl's modes ({TRAINER_MODE}=sync or colocate_async)"
    if _sees(config):
        yield Problem(model.PATH.key, read(config, model.PATH.key), why, remedy)
        return
    for key in IMAGE_KEYS:
        if key in overridden_keys(config) or data.has_column(config, read(config, key)):
            yield Problem(key, read(config, key), why, remedy)
            return


def _sees(config: DictConfig) -> bool:
    """Whether the model takes more than text, by its config.json, or by its name where that is not here."""
    path, own = read(config, model.PATH.key), model.own_config(config)
    if own is None:
        return isinstance(path, str) and NAMED_FOR_IMAGES.search(path.rpartition("/")[2]) is not None
    return any(tower in own for tower in TOWERS)


def lora(config: DictConfig) -> Iterator[Problem]:
    """Yield an adapter that is not merged where the weights travel to other processes: verl sends the base alone."""
    mode = read(config, TRAINER_MODE)
    if mode not in SEPARATE_MODES or read(config, MERGE):
        return
    if any(_is_positive(read(config, key)) for key in LORA) or read(config, ADAPTER) is not None:
        why = (
            f"the mode {mode} pushes the weights to devices of their own, and verl pushes those of an adapter wrongly "
            "unless it is merged"
        )
        yield Problem(MERGE, read(config, MERGE), why, "Set it to true")


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and value > 0
