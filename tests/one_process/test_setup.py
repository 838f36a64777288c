"""What the experiment bench takes from a config, and what it refuses."""

import pytest

from staleness_study import plan
from verl_m2po.launch import registry
from verl_m2po.one_process import setup as setups
from verl_m2po.staleness.needs import set_what_the_mode_needs

pytestmark = pytest.mark.slow


def test_reads_the_config_of_a_run_through_verl():
    setup = setups.read(["loss=m2po", "staleness=s256", "actor_rollout_ref.actor.policy_loss.m2po.threshold=0.1"])
    assert setup.actor.policy_loss.loss_mode == "m2po"
    assert setup.actor.policy_loss.m2po.threshold == 0.1
    assert setup.clock.updates_per_step == 4
    assert setup.staleness_steps == 64
    assert setups.read(["loss=grpo", "staleness=on_policy"]).staleness_steps == 0


@pytest.mark.parametrize("rows", ["null", 4, 24])
def test_micro_batches_hold_whole_prompts_and_divide_the_mini_batch(rows):
    key = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
    by_rows = "actor_rollout_ref.actor.use_dynamic_bsz=false"
    with pytest.raises(setups.NotOnTheBench, match=r"a multiple of the 8 .* a divisor of .* 64"):
        setups.read([by_rows, f"{key}={rows}"])
    setups.read([by_rows, f"{key}=16"])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("actor_rollout_ref.actor.use_kl_loss=true", "actor_rollout_ref.actor.use_kl_loss=True"),
        ("trainer.v1.trainer_mode=separate_async", "trainer.v1.trainer_mode=separate_async"),
        ("actor_rollout_ref.rollout.top_p=0.9", "actor_rollout_ref.rollout.top_p=0.9"),
        ("actor_rollout_ref.rollout.temperature=0", "actor_rollout_ref.rollout.temperature=0"),
        ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.enable=True"),
        ("actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora_rank=8"),
        ("actor_rollout_ref.rollout.ignore_eos=true", "actor_rollout_ref.rollout.ignore_eos=True"),
        ("+actor_rollout_ref.rollout.min_p=0.1", "actor_rollout_ref.rollout.min_p=0.1"),
        ("reward.custom_reward_function.path=/own.py", "reward.custom_reward_function.path=/own.py"),
        ("trainer.v1.sampler.custom_sampler.path=/own.py", "trainer.v1.sampler.custom_sampler.path=/own.py"),
        ("trainer.save_freq=5", "trainer.save_freq=5"),
        ("trainer.v1.replay.reference.reincarnate_after_steps=5", "replay.reference.reincarnate_after_steps=5"),
    ],
)
def test_refuses_what_only_verl_can_do(override, key):
    with pytest.raises(setups.NotOnTheBench, match="needs verl itself") as refused:
        setups.read([override])
    assert key in str(refused.value)


def test_names_all_settings_that_would_change_nothing_but_not_what_follows_them():
    with pytest.raises(setups.NotOnTheBench) as refused:
        setups.read(["task=gsm8k", "loss=grpo"])
    message = str(refused.value)
    assert "data.train_files=" in message and "data.max_response_length=1024" in message
    assert "rollout.response_length" not in message and "clip_ratio" not in message


def test_another_task_is_refused_in_a_primary_config_too():
    with pytest.raises(setups.NotOnTheBench, match=r"data\.train_files="):
        setups.read(["trainer.total_training_steps=2"], "gsm8k_smoke")
    assert setups.read([], "arithmetic").steps == 80


# Which change most, and most differently;
@pytest.mark.parametrize(
    "option",
    [
        *(f"loss={loss}" for loss in ("rec_gspo_is", "oapl", "vcpo", "bapo_code", "dppo", "seq_mis", "max_at_k")),
        *("staleness=s0", "staleness=s256_separate", "advantage=grpo", "hardware=cpu"),
        "actor_rollout_ref.model.path=/a/model",
    ],
)
def test_takes_the_options_that_the_bench_is_for(option):
    setups.read([option])


def test_a_model_that_would_not_be_loaded_is_refused():
    with pytest.raises(setups.NotOnTheBench, match=setups.MODEL):
        setups.read(["model=qwen3_1_7b_base"])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        # asymre is a difference to the mean of the group.
        (["algorithm.adv_estimator=asymre", "actor_rollout_ref.rollout.n=1"], "actor_rollout_ref.rollout.n=1"),
        (["staleness=s64", "trainer.total_training_steps=16"], "trainer.v1.stale_k.staleness_updates=64"),
        (["staleness=s8", "trainer.v1.stale_k.staleness_updates=7"], "trainer.v1.stale_k.staleness_updates=7"),
        (["loss=m2po", "actor_rollout_ref.actor.policy_loss.m2po.threshold=-1"], "threshold"),
        (["loss=mix_ppg", "algorithm.rollout_correction.rollout_is=null"], "rollout_correction.rollout_is"),
    ],
)
def test_refuses_what_the_preflight_refuses_in_its_words(overrides, key):
    with pytest.raises(setups.Refused) as refused:
        setups.read(overrides)
    assert key in str(refused.value)
    config = setups._compose(setups.CONFIG, overrides)
    said = [str(problem) for problem in registry.problems(config, is_ours=True) if problem.is_fatal]
    assert all(line.removeprefix("  - ") in said for line in str(refused.value).splitlines())


@pytest.mark.parametrize("estimator", ["gae", "remax", "optimal_token_baseline", "no_such_estimator"])
def test_an_estimator_without_inputs_is_refused_and_those_that_have_them_are_named(estimator):
    with pytest.raises(setups.NotOnTheBench, match=rf"algorithm\.adv_estimator={estimator} .* asymre, .*grpo, .*rloo"):
        setups.read([f"algorithm.adv_estimator={estimator}"])


@pytest.mark.parametrize("staleness", ["s8", "s8_separate"])
@pytest.mark.parametrize(
    ("loss", "has_proximal_policy"),
    [(["loss=m2po", "algorithm.rollout_correction.bypass_mode=false"], False), (["loss=decoupled_ppo"], True)],
)
def test_the_mode_sets_what_it_sets_through_verl(staleness, loss, has_proximal_policy):
    """bypass_mode=false without weights proximal over behaviour policy would take the age out of every ratio."""
    overrides = [f"staleness={staleness}", *loss]
    setup = setups.read(overrides)
    through_verl = setups._compose(setups.CONFIG, overrides)
    set_what_the_mode_needs(through_verl)
    assert setup.config == through_verl
    assert setup.has_proximal_policy == has_proximal_policy


def test_takes_the_jobs_of_the_study():
    jobs = {job.overrides: job for job in plan.jobs()}
    for job in jobs.values():
        setups.read([*job.all_overrides, f"trainer.total_training_steps={job.steps}"])
