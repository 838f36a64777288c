"""The keys that this package adds to verl's primary configs, made from the dataclasses that read them.

Every default stands in its dataclass, and nowhere else. No value of verl's changes but one: the class that
`policy_loss` is built from, since verl's is closed to new keys and ours is a subclass of it.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from verl.workers.config import PolicyLossConfig

from verl_m2po import advantages
from verl_m2po.losses.config import INTERPOLATION, SETTINGS, M2POPolicyLossConfig
from verl_m2po.losses.kernel.settings import KEY
from verl_m2po.staleness.config import MODES

TARGET = "_target_"
# By their names in Hydra's config. Classes by name, since Hydra makes them: these are not imported here.
CALLBACKS = {
    # Checks a run before anything slow starts.
    "verl_m2po": "verl_m2po.launch.callback.PreflightCallback",
    # Keeps the jobs of a sweep apart.
    "verl_m2po_sweep": "verl_m2po.launch.sweep.SweepCallback",
}


@dataclass
class AlgorithmKeys:
    """Which policy loss, beside verl's own keys of `algorithm`.

    Args:
        policy_loss: Name of the policy loss; wins over actor_rollout_ref.actor.policy_loss.loss_mode. null leaves that
            one alone.
        policy_loss_label: Part of the run's name in our recipes. Options of the group `loss` that share a registered
            loss differ in it.
    """

    policy_loss: str | None = None
    policy_loss_label: str | None = field(
        default=None, metadata={INTERPOLATION: "${oc.select:algorithm.policy_loss,null}"}
    )


@dataclass
class TrainerKeys:
    """Beside verl's own keys of `trainer.v1`.

    Args:
        staleness_label: Part of the run's name in our recipes. Options of the group `staleness` that share a mode and
            its `staleness_updates` differ in it.
    """

    staleness_label: str | None = field(
        default=None,
        metadata={INTERPOLATION: "s${oc.select:trainer.v1.${trainer.v1.trainer_mode}.staleness_updates,0}"},
    )


class Section(NamedTuple):
    """Keys that are added in one place.

    Args:
        key: Where, with dots.
        settings: The dataclass whose fields they are.
        verls: Base class of it whose fields verl has there already; None: all fields are added.
        is_target: Whether verl builds `settings` from the section, by its `_target_`.
    """

    key: str
    settings: type
    verls: type | None = None
    is_target: bool = False

    def fields(self) -> Iterator[dataclasses.Field]:
        """The fields that are added here; those that are sections themselves left out."""
        known = {TARGET} | ({one.name for one in dataclasses.fields(self.verls)} if self.verls is not None else set())
        for one in dataclasses.fields(self.settings):
            if one.name not in known and not dataclasses.is_dataclass(_default(one)):
                yield one

    def values(self) -> dict[str, Any]:
        """Defaults, or the interpolation of a field that follows another key."""
        target = f"{self.settings.__module__}.{self.settings.__qualname__}"
        named = {TARGET: target} if self.is_target else {}
        return named | {one.name: one.metadata.get(INTERPOLATION, _default(one)) for one in self.fields()}


def sections() -> Iterator[Section]:
    """Every place where keys are added, outer ones first."""
    yield Section("algorithm", AlgorithmKeys)
    for name, settings in advantages.SETTINGS.items():
        yield Section(f"algorithm.{name}", settings)
    yield Section(KEY, M2POPolicyLossConfig, verls=PolicyLossConfig, is_target=True)
    for name, settings in SETTINGS.items():
        yield Section(f"{KEY}.{name}", settings, is_target=True)
    yield Section("trainer.v1", TrainerKeys)
    for mode, settings in MODES.items():
        yield from _with_parts(f"trainer.v1.{mode}", settings)


def _with_parts(key: str, settings: type) -> Iterator[Section]:
    yield Section(key, settings)
    for one in dataclasses.fields(settings):
        default = _default(one)
        if dataclasses.is_dataclass(default):
            yield from _with_parts(f"{key}.{one.name}", type(default))


def _default(one: dataclasses.Field) -> Any:
    if one.default_factory is not dataclasses.MISSING:
        return one.default_factory()
    return one.default


def added_keys() -> dict[str, Any]:
    """What is merged into verl's primary configs, as nested mappings."""
    callbacks = {name: {TARGET: target} for name, target in CALLBACKS.items()}
    added: dict[str, Any] = {"hydra": {"callbacks": callbacks}}
    for section in sections():
        node = added
        for part in section.key.split("."):
            node = node.setdefault(part, {})
        node |= section.values()
    return added
