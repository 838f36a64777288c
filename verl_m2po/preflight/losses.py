"""Does the config give the chosen loss what it needs?"""

from collections.abc import Iterator

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from verl_m2po.preflight.problem import Problem

POLICY_LOSS = "actor_rollout_ref.actor.policy_loss"
CALCULATE_LOG_PROBS = "actor_rollout_ref.rollout.calculate_log_probs"
BYPASS_MODE = "algorithm.rollout_correction.bypass_mode"
# verl's own modes in which data may be older than the weights that train on it. Ours set what they need themselves.
VERL_ASYNC_MODES = ("colocate_async", "separate_async")
# Losses whose importance ratio is taken to the behaviour policy.
BEHAVIOUR_RATIO = ("m2po", "m2po_clip", "no_trust_region")


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield what is wrong with the policy loss of `config`."""
    yield from _settings(config)
    name = OmegaConf.select(config, "algorithm.policy_loss")
    if name in BEHAVIOUR_RATIO:
        yield from _behaviour_log_probs(config, name)


def _settings(config: DictConfig) -> Iterator[Problem]:
    try:
        instantiate(OmegaConf.select(config, POLICY_LOSS), _convert_="partial")
    except InstantiationException as error:
        cause = error.__cause__ or error
        yield Problem("algorithm.policy_loss", OmegaConf.select(config, "algorithm.policy_loss"), str(cause), "")


def _behaviour_log_probs(config: DictConfig, name: str) -> Iterator[Problem]:
    bypass = OmegaConf.select(config, BYPASS_MODE)
    mode = OmegaConf.select(config, "trainer.v1.trainer_mode")
    # verl's synchronous trainer recomputes old_log_probs with the very weights that generated: the behaviour policy.
    if mode == "sync" and not bypass:
        return
    if not OmegaConf.select(config, CALCULATE_LOG_PROBS):
        yield Problem(
            CALCULATE_LOG_PROBS,
            OmegaConf.select(config, CALCULATE_LOG_PROBS),
            f"the loss {name} needs the log-probs of the behaviour policy, which are not recorded",
            f"Set {CALCULATE_LOG_PROBS}=true",
        )
    if mode in VERL_ASYNC_MODES and not bypass:
        yield Problem(
            BYPASS_MODE,
            bypass,
            f"the loss {name} takes its importance ratio to the behaviour policy, but without bypass mode {mode} "
            "recomputes old_log_probs with the current weights, and the age of the data disappears from the ratio",
            f"Set {BYPASS_MODE}=true",
        )
