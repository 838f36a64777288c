"""Settings of this package's losses, under verl's own `actor_rollout_ref.actor.policy_loss`."""

import dataclasses
import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verl.base_config import BaseConfig
from verl.workers.config import PolicyLossConfig

from verl_m2po.losses.kernel import registry
from verl_m2po.losses.kernel.settings import KEY, check_boolean
from verl_m2po.losses.step_scale import StepScaleConfig

logger = logging.getLogger(__name__)

INTERPOLATION = "interpolation"
"""In the metadata of a field: the key that its default follows in a composed config."""

registry.load()
SETTINGS: dict[str, type[BaseConfig]] = {
    **{name: loss.settings for name, loss in registry.LOSSES.items() if loss.settings is not None},
    "step_scale": StepScaleConfig,
}
"""Sub-keys of the policy loss settings that are ours."""


@dataclass
class _SelectablePolicyLossConfig(PolicyLossConfig):
    selected: str | None = field(default=None, metadata={INTERPOLATION: "${oc.select:algorithm.policy_loss,null}"})
    requested_mode: str | None = field(
        default=None, metadata={INTERPOLATION: "${oc.select:trainer.v1.trainer_mode,null}"}
    )
    diagnostics: bool = False

    def __post_init__(self):
        check_boolean(self.diagnostics, "diagnostics")
        for name, settings in SETTINGS.items():
            object.__setattr__(self, name, _as_config(getattr(self, name), settings))
        if self.selected is not None:
            check_registered(self.selected)
            if self.loss_mode not in ("vanilla", self.selected):
                logger.warning("algorithm.policy_loss=%s replaces %s.loss_mode=%s.", self.selected, KEY, self.loss_mode)
            # verl freezes its configs; this is the one moment at which ours may still change.
            object.__setattr__(self, "loss_mode", self.selected)


M2POPolicyLossConfig: Any = dataclasses.make_dataclass(
    "M2POPolicyLossConfig",
    [(name, settings, field(default_factory=settings)) for name, settings in SETTINGS.items()],
    bases=(_SelectablePolicyLossConfig,),
    namespace={
        "__module__": __name__,
        "__doc__": """verl's policy loss settings with ours beside them: one field for each of `SETTINGS`.

    Args:
        selected: Registered name of the loss to use, from `algorithm.policy_loss`. It wins over `loss_mode`; null
            leaves `loss_mode` as it is.
        requested_mode: `trainer.v1.trainer_mode`, for the actor worker to see at its first update whether that is what
            trains. null: it is not looked at.
        diagnostics: Log the second moments, the effective sample size and the rest of `actor/m2po/*` for any loss.
    """,
    },
)


def __getattr__(name: str) -> Any:
    # `_target_: verl_m2po.losses.config.<class>` stands in configs that were written before each loss had a file.
    for settings in SETTINGS.values():
        if settings.__name__ == name:
            return settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
