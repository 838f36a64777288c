"""What verl's registries hold of ours, in this process: name -> where it came from, per row of the plugin's table."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from verl_m2po.plugin import Extension


def _losses() -> Mapping[str, Any]:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    return POLICY_LOSS_REGISTRY


def _trainer_modes() -> Mapping[str, Any]:
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    return TRAINER_REGISTRY


def _advantage_estimators() -> Mapping[str, Any]:
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    return ADV_ESTIMATOR_REGISTRY


def _search_path() -> Mapping[str, Any]:
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    search_path = ConfigSearchPathImpl()
    added = {}
    for plugin in Plugins.instance().discover(SearchPathPlugin):
        before = len(search_path.get_path())
        plugin().manipulate_search_path(search_path)  # pyright: ignore[reportAttributeAccessIssue]
        if len(search_path.get_path()) > before:
            added |= {element.path: plugin for element in search_path.get_path() if element.path not in added}
    return added


def _platforms() -> Mapping[str, Any]:
    from verl.plugin.platform import PlatformRegistry

    return {name: PlatformRegistry.get(name) for name in PlatformRegistry.registered_names()}


def _engines() -> Mapping[str, Any]:
    from verl.workers.engine.base import EngineRegistry

    return {
        f"{backend} on {device}": engine
        for backend, by_device in EngineRegistry._engines.get("language_model", {}).items()
        for device, engine in by_device.items()
    }


def _checkpoint_engines() -> Mapping[str, Any]:
    from verl.checkpoint_engine.base import CheckpointEngineRegistry

    return CheckpointEngineRegistry._registry


def _actor_workers() -> Mapping[str, Any]:
    from verl.workers.engine_workers import ActorRolloutRefWorker

    return {ActorRolloutRefWorker.actor_worker_cls.__name__: ActorRolloutRefWorker.actor_worker_cls}


_READERS: dict[str, Callable[[], Mapping[str, Any]]] = {
    "policy loss": _losses,
    "advantage estimator": _advantage_estimators,
    "trainer mode": _trainer_modes,
    "Hydra addition": _search_path,
    "platform": _platforms,
    "training engine": _engines,
    "checkpoint engine": _checkpoint_engines,
    "actor worker": _actor_workers,
}


def origins(extension: Extension) -> dict[str, str | None]:
    """Return, for each name that `extension` promises, the module that registered it; None where it is missing.

    Raises whatever the import of verl's module or of ours raises.
    """
    importlib.import_module(extension.host)
    registry = _READERS[extension.what]()
    return {name: getattr(registry.get(name), "__module__", None) for name in extension.names}
