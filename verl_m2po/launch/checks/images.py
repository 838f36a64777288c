"""Can the images and videos of a run be seen, and what do they cost while their rollouts wait?"""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.settings import Number
from verl_m2po.ground.verl_config import overridden_keys, read
from verl_m2po.launch.checks import data, model

TOWERS = ("vision_config", "audio_config", "thinker_config")
"""Sections of a model's config.json that say it takes more than text."""

KEYS = ("data.image_key", "data.video_key", "data.audio_key")
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
PACKAGES = ("qwen_vl_utils", "torchvision")
"""What verl's data set reads images and videos with."""

_ROLLOUT = "actor_rollout_ref.rollout"
LOAD_FORMAT = f"{_ROLLOUT}.load_format"
NORMALIZES = f"{_ROLLOUT}.engine_kwargs.vllm.mm_device_do_normalize"

FLOAT_BYTES = 4
RAW_BYTES_PER_FRAME_PIXEL = 3
"""Of the picture itself, which is kept with its prompt."""

_OF_A_PATCH = {"patch_size": 14, "temporal_patch_size": 2, "in_channels": 3, "spatial_merge_size": 2}
"""What the size of a prompt's token in pixels follows from, and Qwen2-VL's value where a config.json does not say."""


def blind(config: DictConfig) -> Iterator[Problem]:
    """Yield images for a model that takes text only; verl fails in an assertion when it reads the first of them."""
    own = model.own_config(config)
    if own is not None and not _sees(own):
        for key in _with_images(config):
            why = f"there are images, video or sound, and the model {read(config, model.PATH.key)} takes text only"
            yield Problem(key, read(config, key), why, f"Choose a model that sees ({model.PATH.key}), or data of text")
            return


def processor(config: DictConfig) -> Iterator[Problem]:
    """Yield a model that sees and whose folder has no processor; verl goes on without one, and its workers fail."""
    own, path = model.own_config(config), model.PATH.of(config)
    if own is None or path is None or not _sees(own):
        return
    folder = Path(path).expanduser()
    if not any((folder / name).is_file() for name in PROCESSORS):
        why = f"the model takes images, and its folder has no processor ({' or '.join(PROCESSORS)})"
        yield Problem(model.PATH.key, path, why, "Copy it from where the model is from, with the tokenizer's files")


def packages(config: DictConfig) -> Iterator[Problem]:
    """Yield images that verl's data set lacks the packages for; a class of the user's reads as it likes."""
    if data.is_custom(config):
        return
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    for key in _with_images(config) if missing else ():
        why = f"verl reads images with {' and '.join(PACKAGES)}, and {' and '.join(missing)} cannot be imported"
        names = " ".join(name.replace("_", "-") for name in missing)
        yield Problem(key, read(config, key), why, f"Install them (pip install {names}), or set {data.CUSTOM_DATASET}")
        return


def normalization(config: DictConfig) -> Iterator[Problem]:
    """Yield a rollout that sees noise: vLLM begins with random weights, and verl sends it parameters alone.

    vLLM (0.28) has the means and deviations that it normalizes pixels with in buffers of its model, and fills these by
    random numbers as well.
    """
    own = model.own_config(config)
    if own is None or not _sees(own) or read(config, f"{_ROLLOUT}.name") != "vllm":
        return
    load_format, normalizes = read(config, LOAD_FORMAT), read(config, NORMALIZES)
    if str(load_format).startswith("dummy") and normalizes is not False and _vllm_can_normalize():
        why = (
            "vLLM then fills the constants that it normalizes images with by random numbers, which verl does not "
            "replace: the rollout would see noise, and the trainer images"
        )
        yield Problem(LOAD_FORMAT, load_format, why, f"Add +{NORMALIZES}=false, or set it to auto")


def _vllm_can_normalize() -> bool:
    """Whether this vLLM knows the setting: from the source, as vLLM takes seconds to import."""
    spec = importlib.util.find_spec("vllm")
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / "config" / "multimodal.py"
    return path is not None and path.is_file() and NORMALIZES.rpartition(".")[2] in path.read_text()


def bytes_per_prompt_token(config: DictConfig) -> int:
    """What a token of a prompt costs at most because it may be one of an image; 0 without images.

    Its patches as the processor makes them, in float32, and the picture itself.
    """
    own = model.own_config(config)
    vision = (own or {}).get("vision_config")
    if not isinstance(vision, Mapping) or not _with_images(config):
        return 0
    patch, frames, channels, merge = (_of_a_patch(vision, name) for name in _OF_A_PATCH)
    pixels = (patch * merge) ** 2 * frames
    return pixels * (channels * FLOAT_BYTES + RAW_BYTES_PER_FRAME_PIXEL)


def _of_a_patch(vision: Mapping[str, Any], name: str) -> int:
    value = vision.get(name, _OF_A_PATCH[name])
    return value if Number(name, 1).problem_of(value) is None else _OF_A_PATCH[name]


def _with_images(config: DictConfig) -> list[str]:
    """Keys of columns that the data has, or is said on the command line to have."""
    set_by_hand = overridden_keys(config)
    return [key for key in KEYS if key in set_by_hand or data.has_column(config, read(config, key))]


def _sees(own: Mapping[str, Any]) -> bool:
    return any(tower in own for tower in TOWERS)
