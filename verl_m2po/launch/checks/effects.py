"""Does verl's trainer act on what the config asks of the loss and of the advantages?

Each of these runs to the end, or to its first update, and does something else than it says.
"""

from collections.abc import Iterator

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import TRAINER_MODE, has_proximal_policy, overridden_keys, read
from verl_m2po.losses import requirements
from verl_m2po.staleness.config import is_chosen

TASK_REWARDS = "distillation.distillation_loss.use_task_rewards"
REJECTION = "algorithm.rollout_correction.rollout_rs"
LOSS_TYPE = "algorithm.rollout_correction.loss_type"
VERLS_LOSS_TYPE = "ppo_clip"
KL_IN_REWARD = "algorithm.use_kl_in_reward"
CLIP = "actor_rollout_ref.actor.clip_ratio"
ROUTER_REPLAY = "actor_rollout_ref.rollout.enable_rollout_routing_replay"
STRATEGY = "actor_rollout_ref.actor.strategy"

NOT_SUPPLIED = {
    "remax": "reward_baselines",
    "optimal_token_baseline": "sum_pi_squared",
    "tir_optimal_token_baseline": "sum_pi_squared",
    "gdpo": "the rewards of single aspects",
}
"""Advantage estimators, and what verl 0.9.1's v1 trainer does not hand them: the first step ends in an error."""

WITHOUT_CLIP = ("m2po", "no_trust_region")
"""Losses in which no clip of verl's is left."""


def distillation(config: DictConfig) -> Iterator[Problem]:
    """Yield a policy loss that distillation throws away."""
    if not requirements.names_a_method(config) or not read(config, "distillation.enabled"):
        return
    if read(config, TASK_REWARDS, True) is False:
        loss = requirements.loss_name(config)
        yield Problem(
            TASK_REWARDS,
            False,
            f"verl then trains on the distillation loss alone, and the loss {loss} would be without effect",
            "Set it to true, or choose no policy loss of this package",
        )


def estimator(config: DictConfig) -> Iterator[Problem]:
    """Yield an advantage estimator whose inputs the trainer lacks."""
    name = read(config, requirements.ESTIMATOR)
    if read(config, "trainer.use_v1", True) and isinstance(name, str) and name in NOT_SUPPLIED:
        yield Problem(
            requirements.ESTIMATOR,
            name,
            f"verl's v1 trainer does not supply {NOT_SUPPLIED[name]}, so the first step would end in an error, with or "
            "without verl-m2po",
            f"Set {requirements.ESTIMATOR}=grpo, rloo or reinforce_plus_plus",
        )


def bypassed(config: DictConfig) -> Iterator[Problem]:
    """Yield what the trainer does not do in bypass mode; `rollout_is` is losses/requirements.py's."""
    if not read(config, requirements.BYPASS) or requirements.loss_name(config) == "bypass_mode":
        return
    rejection, loss_type = read(config, REJECTION), read(config, LOSS_TYPE)
    if rejection is not None:
        yield Problem(
            REJECTION,
            rejection,
            "in bypass mode verl's v1 trainer rejects nothing, so the setting would be without effect",
            f"Set {REJECTION}=null, or {requirements.BYPASS}=false",
        )
    if loss_type not in (None, VERLS_LOSS_TYPE):
        yield Problem(
            LOSS_TYPE,
            loss_type,
            f"only verl's loss bypass_mode reads it, and the loss is {requirements.loss_name(config)}",
            f"Set {requirements.POLICY_LOSS}=bypass_mode, or {LOSS_TYPE}={VERLS_LOSS_TYPE}",
        )


def kl_in_reward(config: DictConfig) -> Iterator[Problem]:
    """Warn that the penalty is that of the policy which generated, where that is an old one."""
    mode = read(config, TRAINER_MODE)
    old_is_behaviour = bool(read(config, requirements.BYPASS)) or is_chosen(config)
    if read(config, KL_IN_REWARD) and mode != "sync" and old_is_behaviour and not has_proximal_policy(config):
        yield Problem(
            KL_IN_REWARD,
            True,
            f"with trainer_mode={mode} the rewards get the KL of the behaviour policy, which is as old as the data, "
            "not of the current one",
            "Use actor_rollout_ref.actor.use_kl_loss=true for that of the current policy",
            is_fatal=False,
        )


def clip(config: DictConfig) -> Iterator[Problem]:
    """Mention clip ranges that were set by hand and that the loss does not have."""
    loss = requirements.loss_name(config)
    keys = [key for key in dict.fromkeys(overridden_keys(config)) if key.startswith(CLIP)]
    if loss in WITHOUT_CLIP and keys:
        yield Problem(
            ", ".join(keys),
            ", ".join(str(read(config, key)) for key in keys),
            f"the loss {loss} clips no ratio, so this is without effect",
            f"Leave it out; what is trained on is {requirements.KEY}.m2po.threshold"
            if loss == "m2po"
            else "Leave it out",
            is_fatal=False,
        )


def router_replay(config: DictConfig) -> Iterator[Problem]:
    """Yield routes of a mixture of experts that are kept with every rollout, and that no engine replays."""
    strategy = read(config, STRATEGY)
    if read(config, ROUTER_REPLAY) and str(strategy).startswith("fsdp"):
        why = f"of verl's engines Megatron and VeOmni replay the routes of a rollout, and {STRATEGY} is {strategy}"
        yield Problem(ROUTER_REPLAY, True, why, "Set it to false, or train with one of those")
