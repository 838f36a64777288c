"""Everything that installing this package adds to verl, as one table.

verl imports this module (entry point group ``verl.plugins``) in every process that imports verl, Ray workers included.
Nothing is registered right then: each row below waits until verl itself imports the module that we register with, so
that ``import verl`` costs nothing more. A row that fails raises out of *that* import, where verl cannot swallow it (verl
logs errors of the entry point itself at DEBUG only).
"""

import importlib
import logging
from dataclasses import dataclass
from types import ModuleType

import wrapt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extension:
    """One thing that this package adds to verl.

    Args:
        what: What is added, in the words of verl's documentation.
        host: verl's module that holds the registry. Our side runs right after its import.
        module: Our module. Importing it registers; importing it twice registers once.
    """

    what: str
    host: str
    module: str


EXTENSIONS = (
    Extension("policy losses", "verl.trainer.ppo.core_algos", "verl_m2po.losses"),
    Extension("trainer modes", "verl.trainer.ppo.v1", "verl_m2po.staleness.trainer"),
)


def install(extension: Extension) -> None:
    """Register `extension` as soon as its host module is imported, at once if it is there already."""

    def register(_host: ModuleType) -> None:
        try:
            importlib.import_module(extension.module)
        except Exception as error:
            logger.error(
                "verl-m2po could not register its %s with %s: %s: %s. Run `verl-m2po doctor`.",
                extension.what,
                extension.host,
                type(error).__name__,
                error,
            )
            raise

    wrapt.register_post_import_hook(register, extension.host)


for _extension in EXTENSIONS:
    install(_extension)
