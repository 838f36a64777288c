"""What the experiment bench takes from a config, and what it refuses."""

import pytest

from staleness_study import plan
from verl_m2po.one_process import setup as setups

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
        ("staleness=bounded_async", "trainer.v1.trainer_mode=bounded_async"),
        ("actor_rollout_ref.rollout.top_p=0.9", "actor_rollout_ref.rollout.top_p=0.9"),
        ("actor_rollout_ref.rollout.temperature=0", "actor_rollout_ref.rollout.temperature=0"),
        ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.enable=True"),
        ("actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora_rank=8"),
        ("actor_rollout_ref.rollout.ignore_eos=true", "actor_rollout_ref.rollout.ignore_eos=True"),
        ("+actor_rollout_ref.rollout.min_p=0.1", "actor_rollout_ref.rollout.min_p=0.1"),
        ("reward.custom_reward_function.path=/own.py", "reward.custom_reward_function.path=/own.py"),
        ("trainer.v1.sampler.custom_sampler.path=/own.py", "trainer.v1.sampler.custom_sampler.path=/own.py"),
        ("trainer.save_freq=5", "trainer.save_freq=5"),
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


def test_takes_the_jobs_of_the_study():
    jobs = {job.overrides: job for job in plan.jobs()}
    for job in jobs.values():
        setups.read([*job.all_overrides, f"trainer.total_training_steps={job.steps}"])
