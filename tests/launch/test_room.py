"""TransferQueue starts before the trainer mode, so its limit is lifted before the run, and only where it is too low."""

import pytest
from compose import verl_hydra
from hydra import compose
from omegaconf import OmegaConf

from verl_m2po.launch import callback
from verl_m2po.staleness import checks
from verl_m2po.staleness.checks import memory

STALE = ("trainer.v1.trainer_mode=stale_k", "trainer.v1.stale_k.staleness_updates=256")
# 66 batches of 1024 prompts with 5 responses each; verl's limit is 100,000 entries.
SIZES = ("data.train_batch_size=1024", "actor_rollout_ref.actor.ppo_mini_batch_size=256")


def after_start(*overrides: str):
    with verl_hydra():
        config = compose("ppo_trainer", overrides=[*SIZES, *overrides], return_hydra_config=True)
    callback.PreflightCallback().on_run_start(config, config_name="ppo_trainer")
    return config


def test_the_limit_is_lifted_and_the_preflight_content():
    config = after_start(*STALE, "actor_rollout_ref.rollout.n=5")
    assert OmegaConf.select(config, memory.CAPACITY.key) is None
    assert memory.CAPACITY.key not in {problem.key for problem in checks.check(config)}


@pytest.mark.parametrize(
    "overrides",
    [(), ("trainer.v1.trainer_mode=colocate_async",), (*STALE, "trainer.v1.stale_k.staleness_updates=4")],
)
def test_verls_limit_stays_where_it_is_enough(overrides):
    assert OmegaConf.select(after_start(*overrides), memory.CAPACITY.key) == 100_000


@pytest.mark.parametrize("save_freq", [-1, 2])
def test_a_journal_lifts_the_limit_for_what_a_restart_puts_back(save_freq):
    """At any depth: what is put back grows with the steps since the checkpoint."""
    journalled = (STALE[0], "trainer.v1.stale_k.journal=true", f"trainer.save_freq={save_freq}")
    assert OmegaConf.select(after_start(*journalled), memory.CAPACITY.key) is None
    assert OmegaConf.select(after_start(*journalled, f"{memory.CAPACITY.key}=5"), memory.CAPACITY.key) == 5


def test_the_users_own_limit_stays_and_is_refused():
    config = after_start(*STALE, f"{memory.CAPACITY.key}=5")
    assert OmegaConf.select(config, memory.CAPACITY.key) == 5
    assert memory.CAPACITY.key in {problem.key for problem in checks.check(config)}


def test_a_staleness_that_is_no_number_of_steps_is_left_to_the_preflight():
    config = after_start(STALE[0], "trainer.v1.stale_k.staleness_updates=255")
    assert OmegaConf.select(config, memory.CAPACITY.key) == 100_000


def test_a_run_that_ends_in_its_ramp_is_refused_before_ray_starts():
    config = after_start(*STALE, "trainer.total_training_steps=64")
    problems = [str(problem) for problem in checks.check(config)]
    assert any("the run has 64 trainer steps of 4 updates" in problem for problem in problems)
    longer = after_start(*STALE, "trainer.total_training_steps=65")
    assert not any("the run has" in str(problem) for problem in checks.check(longer))
