"""All losses by name. Each family's file makes its record and registers it here and with verl."""

import importlib

from verl.trainer.ppo.core_algos import register_policy_loss

from verl_m2po.ground import families
from verl_m2po.losses.kernel.evaluate import as_policy_loss
from verl_m2po.losses.kernel.record import Loss

LOSSES: dict[str, Loss] = {}
"""Every loss of this package and of the packages named in entry points, by its registered name."""


def register(loss: Loss) -> Loss:
    """Register `loss` here and with verl; once more changes nothing. Its file must have its name.

    Raises:
        ValueError: The name is taken by another module, or is not that of the file.
    """
    if loss.module.rpartition(".")[2] != loss.name:
        raise ValueError(f"The loss {loss.name} is one file of that name, but its rule is in {loss.module}.")
    known = LOSSES.get(loss.name)
    if known is not None and known.module != loss.module:
        raise ValueError(f"The loss {loss.name} of {loss.module} has the name of one in {known.module}.")
    LOSSES[loss.name] = loss
    register_policy_loss(loss.name)(as_policy_loss(loss))
    return loss


def load() -> None:
    """Import every family: each module of the packages that `ground.families` finds makes its record."""
    for package in families.packages():
        for name in families.modules_of(package):
            importlib.import_module(f"{package}.{name}")
