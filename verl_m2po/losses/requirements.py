"""What the method that a config chooses needs of the rest of it; checked before a run by the preflight.

The needs of a loss of this package stand in its own file. Here are those of verl's losses, of the step scale, of
sequence masking and of the estimators.
"""

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import verl_m2po.losses  # noqa: F401  (fills LOSSES)
from verl_m2po import advantages
from verl_m2po.advantages.groups import settings_of
from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import read
from verl_m2po.losses.kernel import sequence_mask
from verl_m2po.losses.kernel.needs import (
    BEHAVIOUR,
    BYPASS,
    ESTIMATOR,
    LOG_PROBS,
    ROLLOUT_IS,
    Need,
    needs_recorded_log_probs,
)
from verl_m2po.losses.kernel.registry import LOSSES
from verl_m2po.losses.kernel.settings import KEY

POLICY_LOSS = "algorithm.policy_loss"
RESPONSES = "actor_rollout_ref.rollout.n"
OPSM_DELTA = f"{KEY}.{sequence_mask.NAME}.delta"
OPSM_BASE = f"{KEY}.{sequence_mask.NAME}.base"
STEP_SCALE = f"{KEY}.step_scale.power"
DIAGNOSTICS = f"{KEY}.diagnostics"
STRATEGY = "actor_rollout_ref.actor.strategy"
# verl's engines whose optimizer shows the parameter groups that its step reads.
SCALABLE = ("fsdp", "fsdp2", "megatron")

# Of verl's own losses.
VERL_NEEDS: dict[str, tuple[Need, ...]] = {"bypass_mode": BEHAVIOUR}
STEP_SCALE_NEEDS = (
    Need(
        LOG_PROBS,
        (True,),
        "the step is scaled by ratios of current over behaviour policy, whose log-probs are not recorded",
        needs_recorded_log_probs,
    ),
    Need(STRATEGY, SCALABLE, "the learning rate of a single step cannot be changed in this engine's optimizer"),
)
# Estimators that compare the responses to a prompt.
GROUP_ESTIMATORS = tuple(advantages.SETTINGS)
# Losses whose own rule replaces the rollout correction's weights, or makes them itself.
_WEIGHTS_OF_THEIR_OWN = ("bypass_mode",)


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield what the method that `config` chooses needs and does not get, in the words of the preflight.

    Args:
        config: The composed config of a run. Methods that this package knows nothing of have no needs.
    """
    name = loss_name(config)
    loss = LOSSES.get(name)
    for need in VERL_NEEDS.get(name, ()) if loss is None else loss.needs:
        yield from _check(config, need, f"the loss {name}")
    if loss is not None:
        yield from loss.problems(config)
    if name == "dro":
        yield from _dro_beta(config)
    if read(config, STEP_SCALE):
        for need in STEP_SCALE_NEEDS:
            yield from _check(config, need, f"{STEP_SCALE}={read(config, STEP_SCALE)}")
    yield from _opsm(config, name)
    yield from _estimator(config)
    yield from _ignored_weights(config, name)


def loss_name(config: DictConfig) -> str:
    """The policy loss of `config`: ours by `algorithm.policy_loss`, or by verl's own key."""
    named = (read(config, key) for key in (POLICY_LOSS, f"{KEY}.loss_mode"))
    return next((name for name in named if name is not None), "vanilla")


def honours_sequence_mask(name: str) -> bool:
    """Whether the loss reads `opsm.delta` itself."""
    return name in LOSSES and LOSSES[name].rule is not None


def names_a_method(config: DictConfig) -> bool:
    """Whether `config` chooses a loss, a mask or an estimator of this package, by whichever key."""
    return (
        loss_name(config) in LOSSES
        or read(config, ESTIMATOR) in GROUP_ESTIMATORS
        or read(config, OPSM_DELTA) is not None
    )


def _check(config: DictConfig, need: Need, who: str) -> Iterator[Problem]:
    if need.when is not None and not need.when(config):
        return
    value = read(config, need.key)
    if value not in need.allowed:
        remedy = f"Set {need.key}={_as_override(need.allowed[0])}"
        yield Problem(need.key, value, f"{who} cannot work: {need.why}", remedy)


def _as_override(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _dro_beta(config: DictConfig) -> Iterator[Problem]:
    value = read(config, f"{KEY}.dro_beta")
    if not isinstance(value, int | float) or value <= 0:
        yield Problem(
            f"{KEY}.dro_beta",
            value,
            "verl's loss dro refuses anything but a positive number, at its first call",
            f"Set {KEY}.dro_beta=0.1, or choose loss=reinforce, which has no penalty",
        )


def _opsm(config: DictConfig, name: str) -> Iterator[Problem]:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    own = sequence_mask.NAME
    delta, base = read(config, OPSM_DELTA), read(config, OPSM_BASE)
    if name == own and delta is None:
        yield Problem(OPSM_DELTA, delta, f"the loss {own} masks nothing without it", f"Set {OPSM_DELTA}=0.1")
    if name == own and base not in POLICY_LOSS_REGISTRY:
        known = ", ".join(sorted(set(POLICY_LOSS_REGISTRY) - {own}))
        yield Problem(OPSM_BASE, base, "there is no such policy loss", f"Set {OPSM_BASE} to one of {known}")
    if name == own and honours_sequence_mask(base):
        yield Problem(
            OPSM_BASE,
            base,
            f"this loss masks by itself, and the loss {own} around it would hide its other needs",
            f"Set {POLICY_LOSS}={base} with the same {OPSM_DELTA}",
        )
    if name != own and not honours_sequence_mask(name) and delta is not None:
        yield Problem(
            OPSM_DELTA,
            delta,
            f"the loss {name} is not of this package and masks nothing by it",
            f"Set {POLICY_LOSS}={own} {OPSM_BASE}={name}, or {OPSM_DELTA}=null",
        )


def _estimator(config: DictConfig) -> Iterator[Problem]:
    name, responses = read(config, ESTIMATOR), read(config, RESPONSES)
    if name not in GROUP_ESTIMATORS:
        return
    section = f"algorithm.{name}"
    try:
        settings_of(config.algorithm, name, advantages.SETTINGS[name])
    except (ValueError, TypeError, AttributeError, OmegaConfBaseException) as error:
        yield Problem(section, read(config, section), str(error).rstrip("."), "")
        return
    if responses is not None and responses < 2 and name != "max_at_k":
        yield Problem(
            RESPONSES,
            responses,
            f"the advantage estimator {name} compares the responses to a prompt, and there is one",
            f"Set {RESPONSES}=8",
        )
    k = read(config, "algorithm.max_at_k.k")
    if name == "max_at_k" and responses is not None and not (k is not None and 1 <= k <= responses):
        yield Problem(
            "algorithm.max_at_k.k",
            k,
            f"the best of {k} needs that many responses to a prompt, and there are {responses}",
            f"Set algorithm.max_at_k.k to at most {responses}, or {RESPONSES} to more",
        )
    if name == "oapl" and loss_name(config) != "oapl":
        yield Problem(
            ESTIMATOR,
            name,
            f"the loss {loss_name(config)} would push every response of a mixed group whose reward is below its soft "
            "value, which lies above the mean",
            f"Set {POLICY_LOSS}=oapl, or {ESTIMATOR}=grpo",
        )


def _ignored_weights(config: DictConfig, name: str) -> Iterator[Problem]:
    if name in _WEIGHTS_OF_THEIR_OWN:
        return
    value = read(config, ROLLOUT_IS)
    if value is not None and read(config, BYPASS):
        yield Problem(
            ROLLOUT_IS,
            value,
            "in bypass mode verl's v1 trainer makes no such weights, so the setting would be without effect",
            f"Set {ROLLOUT_IS}=null, or {BYPASS}=false for weights proximal over behaviour policy",
        )
