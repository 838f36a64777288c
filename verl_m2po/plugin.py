"""Everything that installing this package adds to verl, as one table.

verl imports this module (entry point group ``verl.plugins``) in every process that imports verl, Ray workers included.
Nothing is registered right then: each row below waits until verl itself imports the module that we register with, so
that ``import verl`` costs nothing more. A row that fails raises out of *that* import, where verl cannot swallow it
(verl logs errors of the entry point itself at DEBUG only).
"""

import importlib
import logging
from dataclasses import dataclass
from types import ModuleType

import wrapt

from verl_m2po import patches
from verl_m2po.cpu import environment
from verl_m2po.ground import families

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extension:
    """One thing that this package adds to verl.

    Args:
        what: What is added, in the words of verl's documentation.
        host: The module that holds the registry. Our side runs right after its import.
        module: Our module. Importing it registers; importing it twice registers once.
        names: What must be in the registry afterwards. `verl-m2po doctor` looks for each of them.
    """

    what: str
    host: str
    module: str
    names: tuple[str, ...]


EXTENSIONS = (
    Extension(
        "policy loss",
        "verl.trainer.ppo.core_algos",
        "verl_m2po.losses",
        families.names(),
    ),
    Extension(
        "advantage estimator",
        "verl.trainer.ppo.core_algos",
        "verl_m2po.advantages",
        ("asymre", "max_at_k", "oapl", "red_drop", "red_weight"),
    ),
    Extension("actor worker", "verl.workers.engine_workers", "verl_m2po.actor.worker", ("M2POTrainingWorker",)),
    Extension(
        "Hydra addition",
        "hydra.core.plugins",
        "verl_m2po.config.hydra",
        ("m2po://overlay", "pkg://verl_m2po.config"),
    ),
    Extension("platform", "verl.plugin.platform.platform_manager", "verl_m2po.cpu.platform", ("cpu",)),
    Extension(
        "training engine", "verl.workers.engine.fsdp.transformer_impl", "verl_m2po.cpu.engine", ("fsdp2 on cpu",)
    ),
    Extension("checkpoint engine", "verl.checkpoint_engine.base", "verl_m2po.cpu.weight_transfer", ("gloo",)),
    Extension(
        "trainer mode",
        "verl.trainer.ppo.v1",
        "verl_m2po.staleness.trainer",
        ("stale_k", "stale_k_separate", "bounded_async", "replay"),
    ),
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


def install_all() -> None:
    """Install every row; one that fails at once does not keep the others out, and its error is raised at the end."""
    errors = []
    for extension in EXTENSIONS:
        try:
            install(extension)
        except Exception as error:
            errors.append(error)
    patches.install(on_cpu=environment.is_selected())
    if errors:
        raise errors[0]


install_all()
