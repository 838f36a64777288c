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
        yield from _actor_worker(config)


def _actor_worker(config: DictConfig) -> Iterator[Problem]:
    """One decision for the whole mini-batch needs our actor worker in verl's seam."""
    scope = f"{KEY}.m2po.scope"
    if OmegaConf.select(config, requirements.POLICY_LOSS) != "m2po" or OmegaConf.select(config, scope) != "mini_batch":
        return
    from verl_m2po import worker

    if reason := worker.why_not_installed():
        yield Problem(scope, "mini_batch", f"{scope}=mini_batch cannot be honoured: {reason.rstrip('.')}.", "")


def _settings(config: DictConfig) -> Iterator[Problem]:
    """Build the settings as verl's workers will, and pass on what they complain of."""
    try:
        instantiate(OmegaConf.select(config, KEY), _convert_="partial")
    except InstantiationException as error:
        yield Problem(KEY, OmegaConf.select(config, KEY), str(error.__cause__ or error).rstrip("."), "")
