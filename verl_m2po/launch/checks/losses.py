"""Does the config give the chosen loss what it needs?"""

from collections.abc import Iterator

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import read
from verl_m2po.losses import requirements
from verl_m2po.losses.kernel.registry import LOSSES
from verl_m2po.losses.kernel.settings import KEY

CONTEXT_PARALLEL = "actor_rollout_ref.actor.megatron.dynamic_context_parallel"


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield what is wrong with the policy loss of `config`."""
    settings = list(_settings(config))
    yield from settings
    if not settings:
        yield from requirements.problems(config)
        yield from _actor_worker(config)


def _actor_worker(config: DictConfig) -> Iterator[Problem]:
    """What concerns the whole mini-batch needs our actor worker in verl's seam."""
    needing = {
        requirements.STEP_SCALE: bool(read(config, requirements.STEP_SCALE)),
        requirements.DIAGNOSTICS: bool(read(config, requirements.DIAGNOSTICS)),
    }
    loss = LOSSES.get(requirements.loss_name(config))
    if loss is not None and loss.decision is not None:
        scope = f"{KEY}.{loss.name}.scope"
        needing[scope] = read(config, scope) == "mini_batch"
    if not any(needing.values()):
        return
    from verl_m2po.actor import worker

    reason = worker.why_not_installed()
    if reason is None and read(config, CONTEXT_PARALLEL) and read(config, requirements.STRATEGY) == "megatron":
        reason = (
            f"{CONTEXT_PARALLEL}=true gives no group of ranks that holds each token once. Switch one of them off "
            "(scope=micro_batch decides for each micro-batch)"
        )
    for key in (key for key, needs in needing.items() if needs and reason):
        value = read(config, key)
        yield Problem(key, value, f"{key}={value} cannot be honoured: {reason}.", "")


def _settings(config: DictConfig) -> Iterator[Problem]:
    """Build the settings as verl's workers will, and pass on what they complain of."""
    try:
        instantiate(read(config, KEY), _convert_="partial")
    except InstantiationException as error:
        yield Problem(KEY, read(config, KEY), str(error.__cause__ or error).rstrip("."), "")
