"""Where losses are: our own package of families and those of others, found without importing any of them.

Another distribution adds losses by an entry point of the group `verl_m2po.losses` whose value is a package; each module
in it is one loss of that name.
"""

import importlib.util
import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

GROUP = "verl_m2po.losses"
OURS = "verl_m2po.losses.family"


@cache
def packages() -> tuple[str, ...]:
    """Names of the packages, ours first."""
    return OURS, *sorted({point.value for point in entry_points(group=GROUP)})


def modules_of(package: str) -> tuple[str, ...]:
    """Names of the modules of `package`, which are those of its losses.

    Raises:
        ModuleNotFoundError: An entry point names a package that is not there.
    """
    return tuple(sorted(module.name for module in pkgutil.iter_modules(_folders(package)) if module.name[0] != "_"))


def names() -> tuple[str, ...]:
    """Names of all losses."""
    return tuple(name for package in packages() for name in modules_of(package))


def _folders(package: str) -> Iterator[str]:
    if package == OURS:
        # `find_spec` would import the packages above it, and with them torch and verl.
        yield str(Path(__file__).parents[1] / "losses" / "family")
        return
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"An entry point of the group {GROUP} names {package}, which is no package here.")
    yield from spec.submodule_search_locations
