"""What a patch says of itself, and how a function of a host library is replaced once."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import wrapt

_HEADINGS = ("Symptom", "Cause", "Delete when")


class Scope(Enum):
    """Where a patch is in effect."""

    CPU = "every process with `VERL_PLATFORM=cpu`"
    CPU_SERVER = "vLLM's workers with `hardware=cpu`"
    STALENESS_DRIVER = "the driver of a run in a staleness mode"
    SETUP = "the trainer of a staleness mode, while it is set up"
    SEPARATE_MODES = "the trainer of `stale_k_separate` and `bounded_async`, while it is set up"
    PUSH = "the rollout servers of `stale_k_separate` and `bounded_async`, while they close for a push"
    CANCELLING = "the rollout servers of the staleness modes, where a group is given up or a server closes for a push"
    STEP_SCALE = "the actor's engine, during a mini-batch with `step_scale.power` set"


@dataclass(frozen=True)
class Patch:
    """One change to a host library.

    Args:
        apply: Makes the change. Its docstring has the paragraphs `Symptom:`, `Cause:` and `Delete when:`.
        replaces: What is changed, as a dotted name.
        scope: Where it is in effect.
        after: The module that `apply` takes, as soon as somebody has imported it; None for a patch that takes none.
    """

    apply: Callable[..., Any]
    replaces: str
    scope: Scope
    after: str | None = None

    def arrange(self) -> None:
        """Apply it now, or right after its module is imported, before anybody binds the function by name."""
        if self.after is None:
            self.apply()
        else:
            wrapt.register_post_import_hook(lambda module: self.apply(module), self.after)

    @property
    def symptom(self) -> str:
        """What happens without it."""
        return self._paragraph("Symptom")

    @property
    def cause(self) -> str:
        """Why, with file and line of the host library."""
        return self._paragraph("Cause")

    @property
    def end(self) -> str:
        """When to delete it."""
        return self._paragraph("Delete when")

    def _paragraph(self, heading: str) -> str:
        """The text after `heading`, on one line.

        Raises:
            ValueError: `apply` does not say it.
        """
        others = "|".join(f"{name}:" for name in _HEADINGS)
        found = re.search(rf"{heading}:\s+(.+?)(?=\s(?:{others})|\n\s*\n|\Z)", self.apply.__doc__ or "", re.DOTALL)
        if found is None:
            raise ValueError(f"{self.apply.__module__}.{self.apply.__name__} does not say '{heading}:'.")
        return " ".join(found[1].split())


def replace(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the function `name` of `owner` by ``make(original)``, once however often it is asked for."""
    original = getattr(owner, name)
    if not hasattr(original, "__m2po_patch__"):
        wrapper = functools.wraps(original)(make(original))
        wrapper.__m2po_patch__ = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapper)
