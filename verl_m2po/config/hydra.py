"""What Hydra learns from this package: our config groups, and the keys that we add to verl's own primary configs.

Registered from `verl_m2po.plugin`, so ``python -m verl.trainer.main_ppo`` knows them before it composes. There is no
``hydra_plugins`` package: Hydra does not find one in every kind of editable install.
"""

from typing import Any

from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

PROVIDER = "verl-m2po"
OUR_CONFIGS = "pkg://verl_m2po.config"
VERL_CONFIGS = "pkg://verl.trainer.config"
SCHEME = "m2po"

# verl's primary configs for its PPO trainer. Recipes that list one of them in their defaults inherit the overlay.
PRIMARY_CONFIGS = ("ppo_trainer", "ppo_megatron_trainer")
OVERLAY = "overlay"

# Our groups, unset: `loss=m2po` then works on verl's own configs, without a `+`. The later one wins.
GROUPS = ("task", "model", "loss", "staleness", "hardware")


class OverlayConfigSource(ConfigSource):
    """verl's primary configs, with the keys of ``overlay.yaml`` added.

    Comes first in the search path and answers for verl's primary configs only: it loads verl's own file and merges our
    keys into it, so the result follows verl's config whatever its version.
    """

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider=provider, path=path)
        self._verl = ImportlibResourcesConfigSource(provider=provider, path=VERL_CONFIGS)
        self._ours = ImportlibResourcesConfigSource(provider=provider, path=OUR_CONFIGS)

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        if not self.is_config(config_path):
            raise ConfigLoadError(f"Config not found: {config_path}")
        result = self._verl.load_config(config_path)
        merged = OmegaConf.merge(result.config, self._ours.load_config(OVERLAY).config)
        assert isinstance(merged, DictConfig)
        merged.defaults.extend([{group: None} for group in GROUPS])
        result.config = merged
        return result

    def available(self) -> bool:
        return self._verl.available()

    def is_group(self, config_path: str) -> bool:
        return False

    def is_config(self, config_path: str) -> bool:
        return config_path.removesuffix(".yaml") in PRIMARY_CONFIGS and self._verl.is_config(config_path)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path or results_filter == ObjectType.GROUP:
            return []
        return [name for name in PRIMARY_CONFIGS if self.is_config(name)]


class M2POSearchPathPlugin(SearchPathPlugin):
    """Puts the overlay before verl's configs and our groups after them."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.prepend(provider=PROVIDER, path=f"{SCHEME}://{OVERLAY}")
        search_path.append(provider=PROVIDER, path=OUR_CONFIGS)


def _register(*plugins: Any) -> None:
    for plugin in plugins:
        Plugins.instance().register(plugin)


_register(OverlayConfigSource, M2POSearchPathPlugin)
