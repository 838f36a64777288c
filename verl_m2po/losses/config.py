"""Settings of this package's losses, under verl's own `actor_rollout_ref.actor.policy_loss`."""

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verl.base_config import BaseConfig
from verl.workers.config import PolicyLossConfig

from verl_m2po.losses.family.bapo import BAPOConfig
from verl_m2po.losses.family.decoupled_loglinear import DecoupledLoglinearConfig
from verl_m2po.losses.family.mix_ppg import MixPPGConfig
from verl_m2po.losses.family.oapl import OAPLConfig
from verl_m2po.losses.family.opsm import OPSMConfig
from verl_m2po.losses.family.rec import RECConfig
from verl_m2po.losses.family.topr import TOPRConfig
from verl_m2po.losses.kernel.mini_batch import SCOPES
from verl_m2po.losses.kernel.settings import KEY, check_choice, check_number
from verl_m2po.losses.step_scale import check_settings
from verl_m2po.second_moment import check_threshold

logger = logging.getLogger(__name__)


@dataclass
class M2POConfig(BaseConfig):
    """Settings of the loss `m2po`.

    Args:
        threshold: Largest mean of (log r)^2 over the kept trust-region tokens. The paper uses 0.04 throughout. inf
            switches the trust region off.
        scope: "mini_batch": one decision for the whole optimizer mini-batch, whatever the micro-batches and ranks.
            "micro_batch": one for each micro-batch on each rank, as other implementations do.
        subtract_mismatch_floor: Count only what exceeds the second moment of tokens whose age is zero, which is due to
            the inference engine and not to staleness. Needs scope mini_batch.
    """

    threshold: float = 0.04
    scope: str = "mini_batch"
    subtract_mismatch_floor: bool = False

    def __post_init__(self):
        check_positive_threshold(self.threshold, f"{KEY}.m2po.threshold")
        check_choice(self.scope, SCOPES, "m2po.scope")
        if self.subtract_mismatch_floor and self.scope != "mini_batch":
            raise ValueError(
                f"{KEY}.m2po.subtract_mismatch_floor=true needs {KEY}.m2po.scope=mini_batch: "
                "the age of a token is not known inside a micro-batch."
            )


@dataclass
class M2POClipConfig(BaseConfig):
    """Settings of the loss `m2po_clip`.

    Args:
        threshold: Budget of the mean of (log r)^2 over trust-region tokens after clipping; 0.04 in the authors'
            scripts. inf switches the clip off.
    """

    threshold: float = 0.04

    def __post_init__(self):
        check_positive_threshold(self.threshold, f"{KEY}.m2po_clip.threshold")


@dataclass
class StepScaleConfig(BaseConfig):
    """VCPO's scaling of the optimizer step by the effective sample size of the mini-batch, for any loss.

    Args:
        power: The learning rate of an update is multiplied by min(1, share / base_share)^power, where share is the
            effective sample size of the mini-batch's responses over their number. The paper: 0.5; 1 is its option
            "linear". None or 0: never.
        base_share: Share from which on the step is whole, in (0, 1]. The paper: 1 (GSM8K, MATH) and 0.55 (AIME,
            multi-turn).
    """

    power: float | None = None
    base_share: float = 1.0

    def __post_init__(self):
        check_number(self.base_share, "step_scale.base_share")
        if self.power is not None:
            check_number(self.power, "step_scale.power")
        check_settings(self.base_share, self.power or 0, f"{KEY}.step_scale")

    @property
    def is_on(self) -> bool:
        """Whether any step may be scaled."""
        return bool(self.power)


# Sub-keys of the policy loss settings that are ours.
SETTINGS: dict[str, type[BaseConfig]] = {
    "m2po": M2POConfig,
    "m2po_clip": M2POClipConfig,
    "rec": RECConfig,
    "oapl": OAPLConfig,
    "decoupled_loglinear": DecoupledLoglinearConfig,
    "bapo": BAPOConfig,
    "topr": TOPRConfig,
    "mix_ppg": MixPPGConfig,
    "opsm": OPSMConfig,
    "step_scale": StepScaleConfig,
}


@dataclass
class M2POPolicyLossConfig(PolicyLossConfig):
    """verl's policy loss settings with ours beside them.

    Args:
        selected: Registered name of the loss to use, from `algorithm.policy_loss`. It wins over `loss_mode`; None
            leaves `loss_mode` as it is.
        requested_mode: `trainer.v1.trainer_mode`, for the actor worker to see at its first update whether that is what
            trains. None: it is not looked at.
        m2po: Settings of the loss `m2po`.
        m2po_clip: Settings of the loss `m2po_clip`.
        rec: Settings of the loss `rec`.
        oapl: Settings of the loss `oapl`.
        decoupled_loglinear: Settings of the loss `decoupled_loglinear`.
        bapo: Settings of the loss `bapo`.
        topr: Settings of the loss `topr`.
        mix_ppg: Settings of the loss `mix_ppg`.
        opsm: Settings of off-policy sequence masking, for every loss of this package and for the loss `opsm`.
        step_scale: Settings of VCPO's step scale, for every loss, verl's included.
        diagnostics: Log the second moments, the effective sample size and the rest of `actor/m2po/*` for any loss.
    """

    selected: str | None = None
    requested_mode: str | None = None
    m2po: M2POConfig = field(default_factory=M2POConfig)
    m2po_clip: M2POClipConfig = field(default_factory=M2POClipConfig)
    rec: RECConfig = field(default_factory=RECConfig)
    oapl: OAPLConfig = field(default_factory=OAPLConfig)
    decoupled_loglinear: DecoupledLoglinearConfig = field(default_factory=DecoupledLoglinearConfig)
    bapo: BAPOConfig = field(default_factory=BAPOConfig)
    topr: TOPRConfig = field(default_factory=TOPRConfig)
    mix_ppg: MixPPGConfig = field(default_factory=MixPPGConfig)
    opsm: OPSMConfig = field(default_factory=OPSMConfig)
    step_scale: StepScaleConfig = field(default_factory=StepScaleConfig)
    diagnostics: bool = False

    def __post_init__(self):
        for name, settings in SETTINGS.items():
            object.__setattr__(self, name, _as_config(getattr(self, name), settings))
        if self.selected is not None:
            check_registered(self.selected)
            if self.loss_mode not in ("vanilla", self.selected):
                logger.warning("algorithm.policy_loss=%s replaces %s.loss_mode=%s.", self.selected, KEY, self.loss_mode)
            # verl freezes its configs; this is the one moment at which ours may still change.
            object.__setattr__(self, "loss_mode", self.selected)


def check_positive_threshold(threshold: Any, key: str) -> None:
    """Raise unless `threshold` is a positive number or inf; `key` is the full name of the setting."""
    check_threshold(threshold, key)
    if threshold == 0:
        raise ValueError(
            f"{key}=0 would drop every trust-region token. Use a positive number (the paper: 0.04), or inf for none."
        )


def check_registered(name: str) -> None:
    """Raise unless `name` is a policy loss that verl knows in this process."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    if name in POLICY_LOSS_REGISTRY:
        return
    nearest = difflib.get_close_matches(str(name), POLICY_LOSS_REGISTRY, n=1)
    suggestion = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(
        f"algorithm.policy_loss={name} is not a registered policy loss.{suggestion} "
        f"Registered: {', '.join(sorted(POLICY_LOSS_REGISTRY))}. A loss of your own must be imported in every process: "
        "name its module in VERL_USE_EXTERNAL_MODULES."
    )


def _as_config(settings: Any, config_class: type[BaseConfig]) -> BaseConfig:
    """`settings` as `config_class`: a mapping without `_target_` arrives as plain keys and values."""
    if isinstance(settings, config_class):
        return settings
    if isinstance(settings, Mapping):
        return config_class(**{key: value for key, value in settings.items() if key != "_target_"})
    raise TypeError(f"{KEY}: expected settings of {config_class.__name__}, got {settings!r}.")
