"""What was tried to win back what old data costs M2PO: a loss in each module, none of them an option of the package.

They see a whole optimizer mini-batch at once with the responses to a prompt in consecutive rows, as on the bench.
"""

import importlib
from typing import TYPE_CHECKING

from verl_m2po.ground import families

if TYPE_CHECKING:
    from verl_m2po.losses.kernel.record import Loss


def names() -> tuple[str, ...]:
    """Names of the losses."""
    return families.modules_of(__name__)


def loss(name: str) -> "Loss":
    """Its record."""
    return importlib.import_module(f"{__name__}.{name}").LOSS


def register_all() -> None:
    """Let this process train with them."""
    from verl_m2po.losses.kernel.registry import register

    for name in names():
        register(loss(name))
