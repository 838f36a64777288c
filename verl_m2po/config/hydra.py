"""What Hydra learns from this package: our config groups, and the keys that we add to verl's own primary configs.

Registered from `verl_m2po.plugin`, so ``python -m verl.trainer.main_ppo`` knows them before it composes. There is no
``hydra_plugins`` package: Hydra does not find one in every kind of editable install.
"""

import logging
import sys
from typing import Any

from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from verl_m2po.launch.checks import keys

logger = logging.getLogger(__name__)

PROVIDER = "verl-m2po"
OUR_CONFIGS = "pkg://verl_m2po.config"
VERL_CONFIGS = "pkg://verl.trainer.config"
SCHEME = "m2po"

# verl's primary configs for its PPO trainer. Recipes that list one of them in their defaults inherit the overlay.
PRIMARY_CONFIGS = (
    "ppo_trainer",
    "ppo_megatron_trainer",
    "_generated_ppo_trainer",
    "_generated_ppo_megatron_trainer",
    "_generated_ppo_torchtitan_trainer",
    "_generated_ppo_veomni_trainer",
)
# Stands for verl's own configs where a search path entry is expected.
OVERLAY = "overlay"

# Our groups, unset: `loss=m2po` then works on verl's own configs, without a `+`. The later one wins.
GROUPS = ("advantage", "task", "model", "loss", "staleness", "replay", "hardware")


def builds_on_primary(config: DictConfig) -> bool:
    """Return whether `config` has one of verl's primary configs in its defaults, and so gets the overlay from there."""
    entries = _defaults(config, [])
    return any(isinstance(entry, str) and entry.lstrip("/") in PRIMARY_CONFIGS for entry in entries)


def _defaults(config: DictConfig, without_any: list[str]) -> Any:
    entries = config.get("defaults")
    return without_any if entries is None else entries


class OverlayConfigSource(ConfigSource):
    """verl's primary configs, with the keys of `verl_m2po.overlay` added.

    Comes first in the search path and answers for verl's primary configs only: it loads the file that Hydra would have
    loaded and merges our keys into it, so the result follows that config whatever its version.

    Args:
        provider: Name for Hydra's messages.
        path: ``m2po://overlay`` for verl's own configs, or ``m2po://`` and the search path entry that comes first in
            this run (``--config-path``): a config there that has the name of one of verl's hides verl's.
    """

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider=provider, path=path)
        self._verl = ImportlibResourcesConfigSource(provider=provider, path=VERL_CONFIGS)
        self._main = self._verl if self.path == OVERLAY else _source(provider, self.path)
        self._bases = (self._main, self._verl)

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def _base(self, config_path: str) -> ConfigSource | None:
        return next((base for base in self._bases if base.available() and base.is_config(config_path)), None)

    def load_config(self, config_path: str) -> ConfigResult:
        base = self._base(config_path) if self.is_config(config_path) else None
        if base is None:
            raise ConfigLoadError(f"Config not found: {config_path}")
        result = base.load_config(config_path)
        assert isinstance(result.config, DictConfig)
        # A config that lists another primary config has the overlay from that one.
        if not builds_on_primary(result.config):
            result.config = self._with_overlay(result.config)
            # Here, because Hydra refuses the key while it composes, before it calls anyone.
            for hint in keys.hints(sys.argv[1:]):
                logger.warning("%s", hint)
        return result

    def _with_overlay(self, config: DictConfig) -> DictConfig:
        # Not above: Hydra is often imported before verl's losses, which this imports.
        from verl_m2po import overlay

        merged = OmegaConf.merge(config, overlay.added_keys())
        assert isinstance(merged, DictConfig)
        # Without a defaults list, what the config itself says comes first: our groups may change it.
        merged.defaults = [
            *_defaults(merged, ["_self_"]),
            *({group: None} for group in GROUPS if not self._has_own(group)),
        ]
        return merged

    def _has_own(self, group: str) -> bool:
        """Whether the directory given with ``--config-path`` has a group of this name, which verl has not."""
        return self._main.is_group(group) and not self._verl.is_group(group)

    def available(self) -> bool:
        return any(base.available() for base in self._bases)

    def is_group(self, config_path: str) -> bool:
        return False

    def is_config(self, config_path: str) -> bool:
        name = config_path.removesuffix(".yaml")
        return name in PRIMARY_CONFIGS and self._base(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path or results_filter == ObjectType.GROUP:
            return []
        return [name for name in PRIMARY_CONFIGS if self.is_config(name)]


def _source(provider: str, path: str) -> ConfigSource:
    scheme = path.split("://", 1)[0] if "://" in path else "file"
    return SourcesRegistry.instance().resolve(scheme)(provider, path)


class M2POSearchPathPlugin(SearchPathPlugin):
    """Puts the overlay before verl's configs and our groups after them."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        main = next((element.path for element in search_path.get_path() if element.provider == "main"), None)
        base = OVERLAY if main in (None, VERL_CONFIGS) else main
        search_path.prepend(provider=PROVIDER, path=f"{SCHEME}://{base}")
        search_path.append(provider=PROVIDER, path=OUR_CONFIGS)


def _register(*plugins: Any) -> None:
    for plugin in plugins:
        Plugins.instance().register(plugin)


_register(OverlayConfigSource, M2POSearchPathPlugin)
