"""What each method needs of the rest of the config, as data; checked before a run by the preflight.

A need names one setting, what it may be, and what goes wrong otherwise. Needs that depend on other settings are small
functions of the config.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import has_proximal_policy
from verl_m2po.losses.kernel.settings import KEY

POLICY_LOSS = "algorithm.policy_loss"
MODE = "trainer.v1.trainer_mode"
VERL_MODES = ("sync", "colocate_async", "separate_async")
ESTIMATOR = "algorithm.adv_estimator"
NORM_BY_STD = "algorithm.norm_adv_by_std_in_grpo"
BYPASS = "algorithm.rollout_correction.bypass_mode"
ROLLOUT_IS = "algorithm.rollout_correction.rollout_is"
ROLLOUT_IS_THRESHOLD = "algorithm.rollout_correction.rollout_is_threshold"
ROLLOUT_IS_NORMALIZE = "algorithm.rollout_correction.rollout_is_batch_normalize"
LOG_PROBS = "actor_rollout_ref.rollout.calculate_log_probs"
RESPONSES = "actor_rollout_ref.rollout.n"
AGGREGATION = "actor_rollout_ref.actor.loss_agg_mode"
OPSM_DELTA = f"{KEY}.opsm.delta"
OPSM_BASE = f"{KEY}.opsm.base"
STEP_SCALE = f"{KEY}.step_scale.power"
DIAGNOSTICS = f"{KEY}.diagnostics"
MISMATCH_FLOOR = f"{KEY}.m2po.subtract_mismatch_floor"
STRATEGY = "actor_rollout_ref.actor.strategy"
# verl's engines whose optimizer shows the parameter groups that its step reads.
SCALABLE = ("fsdp", "fsdp2", "megatron")
REC = f"{KEY}.rec"

# Weights below this can be truncated by verl without a word, and mix_ppg's clip would stand in the wrong place.
NO_TRUNCATION = 100.0


class Need(NamedTuple):
    """A setting that a method needs.

    Args:
        key: Full name of the setting.
        allowed: Values that it may have; the first is the one that the remedy names.
        why: What goes wrong otherwise, in one clause.
        when: Whether the need holds for a config; None: always.
    """

    key: str
    allowed: tuple[Any, ...]
    why: str
    when: Callable[[DictConfig], bool] | None = None


def _needs_recorded_log_probs(config: DictConfig) -> bool:
    mode = OmegaConf.select(config, MODE)
    if mode not in VERL_MODES:
        # The staleness modes of this package record them in any case.
        return False
    # verl's synchronous trainer recomputes old_log_probs with the very weights that generated: the behaviour policy.
    return mode != "sync" or bool(OmegaConf.select(config, BYPASS))


def _needs_bypass(config: DictConfig) -> bool:
    if OmegaConf.select(config, MODE) not in VERL_MODES:
        # The staleness modes of this package set it themselves, unless the config asks for a proximal policy.
        return has_proximal_policy(config)
    return _needs_recorded_log_probs(config)


def _divides_by_std(config: DictConfig) -> bool:
    is_grpo = OmegaConf.select(config, f"{REC}.clip") == "one_side"
    is_grpo = is_grpo and OmegaConf.select(config, f"{REC}.weight") == "importance_sampling"
    # One-side REC with importance sampling and normalised advantages is GRPO: allowed, since it says what it is.
    return OmegaConf.select(config, ESTIMATOR) == "grpo" and not is_grpo


def _is_gspo(config: DictConfig) -> bool:
    return OmegaConf.select(config, f"{REC}.clip") == "gspo_one_side"


_NEEDS_BEHAVIOUR = (
    Need(
        LOG_PROBS,
        (True,),
        "the ratio is taken to the behaviour policy, whose log-probs are not recorded",
        _needs_recorded_log_probs,
    ),
    Need(
        BYPASS,
        (True,),
        "the ratio is taken to the behaviour policy, but old_log_probs are recomputed with the current weights, and "
        "the age of the data disappears from the ratio",
        _needs_bypass,
    ),
)
_NEEDS_BOTH_POLICIES = (
    Need(LOG_PROBS, (True,), "the weights are proximal over behaviour policy, whose log-probs are not recorded"),
    Need(BYPASS, (False,), "there is no proximal policy beside the behaviour policy in bypass mode"),
)

LOSS_NEEDS: dict[str, tuple[Need, ...]] = {
    "m2po": _NEEDS_BEHAVIOUR,
    "m2po_clip": _NEEDS_BEHAVIOUR,
    "no_trust_region": _NEEDS_BEHAVIOUR,
    "rec": (
        *_NEEDS_BEHAVIOUR,
        Need(
            NORM_BY_STD,
            (False,),
            "REC takes reward minus group mean, not divided by a standard deviation",
            _divides_by_std,
        ),
        Need(AGGREGATION, ("seq-mean-token-mean",), "a clip of whole responses averages over responses", _is_gspo),
    ),
    "oapl": (
        *_NEEDS_BEHAVIOUR,
        Need(ESTIMATOR, ("oapl",), "OAPL regresses onto reward minus soft value, which only this estimator gives"),
        Need(AGGREGATION, ("seq-mean-token-sum",), "OAPL is a mean over responses"),
    ),
    "decoupled_loglinear": _NEEDS_BEHAVIOUR,
    "bapo": _NEEDS_BEHAVIOUR,
    "topr": _NEEDS_BEHAVIOUR,
    "mix_ppg": (
        *_NEEDS_BOTH_POLICIES,
        Need(ROLLOUT_IS, ("token",), "the clip is centred on proximal over behaviour policy, token by token"),
        Need(ROLLOUT_IS_NORMALIZE, (False,), "normalised weights are not proximal over behaviour policy any more"),
    ),
    "opsm": _NEEDS_BEHAVIOUR,
    "bypass_mode": _NEEDS_BEHAVIOUR,
}
STEP_SCALE_NEEDS = (
    Need(
        LOG_PROBS,
        (True,),
        "the step is scaled by ratios of current over behaviour policy, whose log-probs are not recorded",
        _needs_recorded_log_probs,
    ),
    Need(STRATEGY, SCALABLE, "the learning rate of a single step cannot be changed in this engine's optimizer"),
)
# Estimators that compare the responses to a prompt.
GROUP_ESTIMATORS = ("oapl", "asymre", "red_drop", "red_weight", "max_at_k")
# Losses that read `opsm.delta` themselves.
HONOUR_OPSM = (
    "m2po",
    "m2po_clip",
    "no_trust_region",
    "rec",
    "oapl",
    "decoupled_loglinear",
    "bapo",
    "topr",
    "mix_ppg",
)
# Losses whose own rule replaces the rollout correction's weights, or makes them itself.
_WEIGHTS_OF_THEIR_OWN = ("bypass_mode",)


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield what the method that `config` chooses needs and does not get, in the words of the preflight.

    Args:
        config: The composed config of a run. Methods that this package knows nothing of have no needs.
    """
    name = loss_name(config)
    for need in LOSS_NEEDS.get(name, ()):
        yield from _check(config, need, f"the loss {name}")
    if name == "m2po":
        yield from _ages(config)
    if name == "mix_ppg":
        yield from _truncation(config)
    if name == "dro":
        yield from _dro_beta(config)
    if OmegaConf.select(config, STEP_SCALE):
        for need in STEP_SCALE_NEEDS:
            yield from _check(config, need, f"{STEP_SCALE}={OmegaConf.select(config, STEP_SCALE)}")
    yield from _opsm(config, name)
    yield from _estimator(config)
    yield from _ignored_weights(config, name)


def loss_name(config: DictConfig) -> str:
    """The policy loss of `config`: ours by `algorithm.policy_loss`, or by verl's own key."""
    return OmegaConf.select(config, POLICY_LOSS) or OmegaConf.select(config, f"{KEY}.loss_mode") or "vanilla"


def names_a_method(config: DictConfig) -> bool:
    """Whether `config` chooses a loss, a mask or an estimator of this package, by whichever key."""
    return (
        loss_name(config) in ("opsm", *HONOUR_OPSM)
        or OmegaConf.select(config, ESTIMATOR) in GROUP_ESTIMATORS
        or OmegaConf.select(config, OPSM_DELTA) is not None
    )


def _check(config: DictConfig, need: Need, who: str) -> Iterator[Problem]:
    if need.when is not None and not need.when(config):
        return
    value = OmegaConf.select(config, need.key)
    if value not in need.allowed:
        remedy = f"Set {need.key}={_as_override(need.allowed[0])}"
        yield Problem(need.key, value, f"{who} cannot work: {need.why}", remedy)


def _as_override(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _ages(config: DictConfig) -> Iterator[Problem]:
    if OmegaConf.select(config, MISMATCH_FLOOR) and OmegaConf.select(config, MODE) in VERL_MODES:
        yield Problem(
            MISMATCH_FLOOR,
            True,
            f"the floor is measured on tokens of age zero, and {MODE}={OmegaConf.select(config, MODE)} gives no ages",
            f"Set it to false, or {MODE} to stale_k, stale_k_separate or bounded_async",
        )


def _truncation(config: DictConfig) -> Iterator[Problem]:
    value = OmegaConf.select(config, ROLLOUT_IS_THRESHOLD)
    try:
        is_high = float(value) >= NO_TRUNCATION and "_" not in str(value)
    except (TypeError, ValueError):
        is_high = False
    if not is_high:
        yield Problem(
            ROLLOUT_IS_THRESHOLD,
            value,
            "the loss mix_ppg would centre its clip on truncated weights",
            f"Set {ROLLOUT_IS_THRESHOLD}=1e6",
        )


def _dro_beta(config: DictConfig) -> Iterator[Problem]:
    value = OmegaConf.select(config, f"{KEY}.dro_beta")
    if not isinstance(value, int | float) or value <= 0:
        yield Problem(
            f"{KEY}.dro_beta",
            value,
            "verl's loss dro refuses anything but a positive number, at its first call",
            f"Set {KEY}.dro_beta=0.1, or choose loss=reinforce, which has no penalty",
        )


def _opsm(config: DictConfig, name: str) -> Iterator[Problem]:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    delta, base = OmegaConf.select(config, OPSM_DELTA), OmegaConf.select(config, OPSM_BASE)
    if name == "opsm" and delta is None:
        yield Problem(OPSM_DELTA, delta, "the loss opsm masks nothing without it", f"Set {OPSM_DELTA}=0.1")
    if name == "opsm" and base not in POLICY_LOSS_REGISTRY:
        known = ", ".join(sorted(set(POLICY_LOSS_REGISTRY) - {"opsm"}))
        yield Problem(OPSM_BASE, base, "there is no such policy loss", f"Set {OPSM_BASE} to one of {known}")
    if name == "opsm" and base in HONOUR_OPSM:
        yield Problem(
            OPSM_BASE,
            base,
            "this loss masks by itself, and the loss opsm around it would hide its other needs",
            f"Set {POLICY_LOSS}={base} with the same {OPSM_DELTA}",
        )
    if name not in ("opsm", *HONOUR_OPSM) and delta is not None:
        yield Problem(
            OPSM_DELTA,
            delta,
            f"the loss {name} is not of this package and masks nothing by it",
            f"Set {POLICY_LOSS}=opsm {OPSM_BASE}={name}, or {OPSM_DELTA}=null",
        )


def _estimator(config: DictConfig) -> Iterator[Problem]:
    name, responses = OmegaConf.select(config, ESTIMATOR), OmegaConf.select(config, RESPONSES)
    if name not in GROUP_ESTIMATORS:
        return
    if responses is not None and responses < 2 and name != "max_at_k":
        yield Problem(
            RESPONSES,
            responses,
            f"the advantage estimator {name} compares the responses to a prompt, and there is one",
            f"Set {RESPONSES}=8",
        )
    k = OmegaConf.select(config, "algorithm.max_at_k.k")
    if name == "max_at_k" and responses is not None and not 1 <= (k or 0) <= responses:
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
    value = OmegaConf.select(config, ROLLOUT_IS)
    if value is not None and OmegaConf.select(config, BYPASS):
        yield Problem(
            ROLLOUT_IS,
            value,
            "in bypass mode verl's v1 trainer makes no such weights, so the setting would be without effect",
            f"Set {ROLLOUT_IS}=null, or {BYPASS}=false for weights proximal over behaviour policy",
        )
