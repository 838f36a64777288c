"""Can the reference of the KL loss move as it is asked to?"""

from collections.abc import Iterator
from dataclasses import asdict

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.settings import Number
from verl_m2po.ground.verl_config import TRAINER_MODE, has_proximal_policy, read, trains_an_adapter
from verl_m2po.staleness.checks.numbers import TOTAL_STEPS, mode_and_settings
from verl_m2po.staleness.config import ReferenceConfig, ReplayModeConfig

KEY = "trainer.v1.replay.reference"
NUMBERS = (
    Number("least_base_share", 0, 1, is_whole=False, meaning="a share"),
    Number("constant_steps", 0, meaning="trainer steps"),
    Number("fall_every_steps", 1, meaning="trainer steps"),
    Number("share_fall", 0, 1, is_whole=False, excludes_least=True, meaning="a part of the share"),
    Number("reincarnate_after_steps", 1, may_be_null=True, meaning="trainer steps"),
)
USE_KL_LOSS, USE_KL_IN_REWARD = "actor_rollout_ref.actor.use_kl_loss", "algorithm.use_kl_in_reward"
KL_TYPE = "actor_rollout_ref.actor.kl_loss_type"
LINEAR = ("kl", "k1", "mse", "k2")
"""verl's estimators whose gradient is linear in the reference log-prob; so is that of all whose name ends in +."""
STRATEGY, SHARDED = "actor_rollout_ref.actor.strategy", ("fsdp", "fsdp2")


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield settings of the reference that no run can honour."""
    settings = mode_and_settings(config)[1]
    if not isinstance(settings, ReplayModeConfig) or settings.reference == ReferenceConfig():
        return
    reference = settings.reference
    wrong = [problem for number in NUMBERS if (problem := number.problem_of(getattr(reference, number.key)))]
    yield from (problem._replace(key=f"{KEY}.{problem.key}") for problem in wrong)
    if wrong:
        return
    if reference.least_base_share < 1:
        yield from _of_two_policies(config, reference)
    if reference.reincarnate_after_steps is not None:
        yield from _of_another_base(config, reference.reincarnate_after_steps)


def in_another_mode(config: DictConfig) -> Iterator[Problem]:
    """Yield a reference that was asked to move, as by `replay=remix_whole`, in a mode whose reference stays."""
    mode, asked = read(config, TRAINER_MODE), read(config, KEY)
    if mode == "replay" or not isinstance(asked, DictConfig):
        return
    for setting, default in asdict(ReferenceConfig()).items():
        if setting in asked and asked[setting] != default:
            why = f"{TRAINER_MODE}={mode} does not read it: the reference stays the base model to the end"
            remedy = f"Set staleness=replay beside it; without {KEY} replay=remix has the same batches"
            yield Problem(f"{KEY}.{setting}", asked[setting], why, remedy)
            return


def _of_two_policies(config: DictConfig, reference: ReferenceConfig) -> Iterator[Problem]:
    key, share = f"{KEY}.least_base_share", reference.least_base_share
    if not read(config, USE_KL_LOSS) and not read(config, USE_KL_IN_REWARD):
        yield Problem(
            key, share, "there is no KL loss whose reference could move", f"Set {USE_KL_LOSS}=true, or it to 1"
        )
    elif not has_proximal_policy(config):
        why = "the KL loss is to be taken to the policy at the start of the step, whose log-probs are not computed"
        yield Problem(key, share, why, "Set loss=mix_ppg or another decoupled loss beside it, or it to 1")
    kind = str(read(config, KL_TYPE))
    if read(config, USE_KL_LOSS) and kind not in LINEAR and not kind.endswith("+"):
        why = f"with {key}={share} two KL losses are taken as one, which its gradient does not allow"
        yield Problem(KL_TYPE, kind, why, "Set it to k2 or to low_var_kl+, whose gradient is that of k2")


def _of_another_base(config: DictConfig, after: int) -> Iterator[Problem]:
    key = f"{KEY}.reincarnate_after_steps"
    if trains_an_adapter(config):
        why = "the reference of a run that trains an adapter is the model without it, which cannot become another"
        yield Problem(key, after, why, "Set it to null; start a new run from the merged weights instead")
    strategy = read(config, STRATEGY, "fsdp")
    if strategy not in SHARDED:
        why = f"with {STRATEGY}={strategy} the weights are not copied from actor to reference; FSDP's are"
        yield Problem(key, after, why, f"Set it to null, or {STRATEGY} to fsdp2")
    steps = TOTAL_STEPS.of(config)
    if steps is not None and after >= steps:
        why = f"the run has {steps} trainer steps, and ends before it"
        yield Problem(key, after, why, "Set it to null, or lower, if that is not meant", is_fatal=False)
