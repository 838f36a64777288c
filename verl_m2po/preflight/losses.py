"""Does the config give the chosen loss what it needs?"""

from collections.abc import Iterator

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from verl_m2po.losses import requirements
from verl_m2po.losses.settings import KEY
from verl_m2po.preflight.problem import Problem


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield what is wrong with the policy loss of `config`."""
    settings = list(_settings(config))
    yield from settings
    if not settings:
        yield from requirements.problems(config)


def _settings(config: DictConfig) -> Iterator[Problem]:
    """Build the settings as verl's workers will, and pass on what they complain of."""
    try:
        instantiate(OmegaConf.select(config, KEY), _convert_="partial")
    except InstantiationException as error:
        yield Problem(KEY, OmegaConf.select(config, KEY), str(error.__cause__ or error).rstrip("."), "")
