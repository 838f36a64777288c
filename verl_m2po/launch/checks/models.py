"""Has the model what is asked of it?"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import read, trains_an_adapter
from verl_m2po.launch.checks import model

ESTIMATOR = "algorithm.adv_estimator"
KL = ("actor_rollout_ref.actor.use_kl_loss", "algorithm.use_kl_in_reward")
TARGETS = "actor_rollout_ref.model.target_modules"


def lora(config: DictConfig) -> Iterator[Problem]:
    """Yield targets of an adapter that the model does not have; verl would find out when everything has started."""
    targets, path = read(config, TARGETS), read(config, model.PATH.key)
    if not trains_an_adapter(config) or targets in (None, "all-linear") or not isinstance(path, str):
        return
    modules = {name for file in Path(path).expanduser().glob("*.safetensors") for name in _modules(file)}
    missing = [name for name, target in _patterns(targets).items() if not any(map(target.fullmatch, modules))]
    if modules and missing:
        last = sorted({name.rpartition(".")[2] for name in modules})
        why = f"the model has no module {', '.join(missing)}; its modules are named {', '.join(last)}"
        yield Problem(TARGETS, targets, why, "Name some of these, or set it to all-linear")


def adapters_beside_a_critic(config: DictConfig) -> Iterator[Problem]:
    """Yield a critic beside adapters whose base is the reference policy.

    verl 0.9.1 asks the actor to leave its adapters out for the reference, in the batch's metadata, and asks the critic
    next with the same metadata (`_compute_ref_log_prob` and `_compute_values` of trainer_base.py).
    """
    estimator, has_critic = read(config, ESTIMATOR), read(config, "critic.enable")
    has_critic = estimator == "gae" if has_critic is None else has_critic
    kl = [key for key in KL if read(config, key)]
    if trains_an_adapter(config) and has_critic and kl:
        why = (
            f"with adapters and {kl[0]}=true verl hands the order to leave the adapters out on to the critic, which "
            "has none and fails at the first step"
        )
        yield Problem(ESTIMATOR, estimator, why, f"Set {kl[0]} to false, train without adapters, or take grpo")


def _patterns(targets: Any) -> dict[str, re.Pattern[str]]:
    """As peft reads them: one string is a pattern of the whole name, those of a list are its last parts."""
    if isinstance(targets, str):
        return {targets: re.compile(targets)}
    return {str(target): re.compile(rf"(?:.*\.)?{re.escape(str(target))}") for target in targets}


def _modules(file: Path) -> Iterator[str]:
    """Names of the modules that have a weight in a file of safetensors: its header is JSON, after 8 bytes of length."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    for name in header.keys() - {"__metadata__"}:
        yield name.rpartition(".")[0]
