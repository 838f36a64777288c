"""What each method needs: every preset meets its own needs, and every violation is named with its remedy."""

from functools import cache
from importlib import resources

import pytest
from compose import composed
from omegaconf import DictConfig, OmegaConf

import verl_m2po.losses  # noqa: F401
from verl_m2po.losses.requirements import problems

PRESETS = sorted(
    entry.name.removesuffix(".yaml")
    for entry in (resources.files("verl_m2po.config") / "loss").iterdir()
    if entry.name.endswith(".yaml")
)
# Modes in which the data is older than the weights that train on it.
STALE = "trainer.v1.trainer_mode=colocate_async"
EXACT = "trainer.v1.trainer_mode=stale_k"
POLICY_LOSS = "actor_rollout_ref.actor.policy_loss"
CORRECTION = "algorithm.rollout_correction"


@cache
def preset(name: str) -> DictConfig:
    return composed(f"loss={name}", STALE)


def changed(name: str, *overrides: str) -> DictConfig:
    return OmegaConf.merge(preset(name), OmegaConf.from_dotlist(list(overrides)))


@pytest.mark.parametrize("mode", [STALE, EXACT])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_meets_its_own_needs(name, mode):
    assert list(problems(changed(name, mode))) == []


def test_a_config_that_knows_nothing_of_methods_has_no_needs():
    assert list(problems(composed(config_name="ppo_trainer"))) == []
    assert list(problems(OmegaConf.create({}))) == []


VIOLATIONS = [
    (["rec", f"{CORRECTION}.bypass_mode=false"], f"{CORRECTION}.bypass_mode", "Set {key}=true"),
    (
        ["topr", "actor_rollout_ref.rollout.calculate_log_probs=false"],
        "actor_rollout_ref.rollout.calculate_log_probs",
        "Set {key}=true",
    ),
    (["rec", "algorithm.norm_adv_by_std_in_grpo=true"], "algorithm.norm_adv_by_std_in_grpo", "Set {key}=false"),
    (
        ["rec_gspo_is", "actor_rollout_ref.actor.loss_agg_mode=token-mean"],
        "actor_rollout_ref.actor.loss_agg_mode",
        "Set {key}=seq-mean-token-mean",
    ),
    (["oapl", "algorithm.adv_estimator=grpo"], "algorithm.adv_estimator", "Set {key}=oapl"),
    (
        ["oapl", "actor_rollout_ref.actor.loss_agg_mode=token-mean"],
        "actor_rollout_ref.actor.loss_agg_mode",
        "Set {key}=seq-mean-token-sum",
    ),
    (["topr", "algorithm.adv_estimator=oapl"], "algorithm.adv_estimator", "Set algorithm.policy_loss=oapl"),
    (["mix_ppg", f"{CORRECTION}.bypass_mode=true"], f"{CORRECTION}.bypass_mode", "Set {key}=false"),
    (["mix_ppg", f"{CORRECTION}.rollout_is=sequence"], f"{CORRECTION}.rollout_is", "Set {key}=token"),
    (["mix_ppg", f"{CORRECTION}.rollout_is_threshold=2"], f"{CORRECTION}.rollout_is_threshold", "Set {key}=1e6"),
    (
        ["mix_ppg", f"{CORRECTION}.rollout_is_threshold='0.5_500'"],
        f"{CORRECTION}.rollout_is_threshold",
        "Set {key}=1e6",
    ),
    (["dro", f"{POLICY_LOSS}.dro_beta=null"], f"{POLICY_LOSS}.dro_beta", "Set {key}=0.1"),
    (["opsm", f"{POLICY_LOSS}.opsm.delta=null"], f"{POLICY_LOSS}.opsm.delta", "Set {key}=0.1"),
    (["opsm", f"{POLICY_LOSS}.opsm.base=gsop"], f"{POLICY_LOSS}.opsm.base", "Set {key} to one of bapo, "),
    (["opsm", f"{POLICY_LOSS}.opsm.base=m2po"], f"{POLICY_LOSS}.opsm.base", "algorithm.policy_loss=m2po"),
    (["gspo", f"{POLICY_LOSS}.opsm.delta=0.1"], f"{POLICY_LOSS}.opsm.delta", "Set algorithm.policy_loss=opsm"),
    (["asymre", "actor_rollout_ref.rollout.n=1"], "actor_rollout_ref.rollout.n", "Set {key}=8"),
    (["max_at_k", "algorithm.max_at_k.k=9"], "algorithm.max_at_k.k", "Set {key} to at most 8"),
    (["gspo", f"{CORRECTION}.rollout_is=token"], f"{CORRECTION}.rollout_is", "Set {key}=null"),
    (
        ["grpo", f"{POLICY_LOSS}.step_scale.power=0.5", "actor_rollout_ref.rollout.calculate_log_probs=false"],
        "actor_rollout_ref.rollout.calculate_log_probs",
        "Set {key}=true",
    ),
    (["vcpo", "actor_rollout_ref.actor.strategy=veomni"], "actor_rollout_ref.actor.strategy", "Set {key}=fsdp"),
    (
        # A proximal policy would take the age of the data out of this loss's ratio.
        ["m2po", EXACT, f"{CORRECTION}.bypass_mode=false", f"{CORRECTION}.rollout_is=token"],
        f"{CORRECTION}.bypass_mode",
        "Set {key}=true",
    ),
]


@pytest.mark.parametrize(("overrides", "key", "remedy"), VIOLATIONS)
def test_a_violation_is_named_with_key_value_and_remedy(overrides, key, remedy):
    config = changed(*overrides)
    found = {problem.key: problem for problem in problems(config)}
    assert key in found
    assert found[key].value == OmegaConf.select(config, key)
    assert remedy.format(key=key) in found[key].remedy


@pytest.mark.parametrize(
    ("preset_name", "key", "value"),
    [
        ("max_at_k", "algorithm.max_at_k.k", 2.5),
        ("max_at_k", "algorithm.max_at_k.baseline", "mean"),
        ("oapl", "algorithm.oapl.beta1", -1),
        ("red_weight", "algorithm.red_weight.temperature", "x"),
        ("asymre", "algorithm.asymre.baseline_shift", "x"),
    ],
)
def test_what_an_estimator_would_refuse_is_refused_before_the_start(preset_name, key, value):
    (problem,) = problems(changed(preset_name, f"{key}={value}"))
    assert problem.is_fatal and key in str(problem) and str(value) in str(problem)


def test_the_remedies_leave_nothing_to_complain_about():
    broken = ["mix_ppg", f"{CORRECTION}.bypass_mode=true", f"{CORRECTION}.rollout_is=null"]
    remedies = [problem.remedy.removeprefix("Set ") for problem in problems(changed(*broken))]
    assert remedies and list(problems(changed(*broken, *remedies))) == []


def test_the_synchronous_trainer_needs_no_recorded_log_probs():
    recomputed = [f"{CORRECTION}.bypass_mode=false", "actor_rollout_ref.rollout.calculate_log_probs=false"]
    assert list(problems(changed("topr", "trainer.v1.trainer_mode=sync", *recomputed))) == []


def test_grpo_as_a_member_of_rec_may_divide_by_the_standard_deviation():
    assert list(problems(changed("rec_one_side_is", "algorithm.norm_adv_by_std_in_grpo=true"))) == []


def test_our_losses_honour_opsm_themselves():
    assert list(problems(changed("m2po", f"{POLICY_LOSS}.opsm.delta=0.1"))) == []
