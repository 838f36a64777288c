"""What the experiment bench takes from a config, and what it refuses."""

import pytest

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
    ],
)
def test_refuses_what_only_verl_can_do(override, key):
    with pytest.raises(setups.NotOnTheBench, match="needs verl itself") as refused:
        setups.read([override])
    assert key in str(refused.value)
