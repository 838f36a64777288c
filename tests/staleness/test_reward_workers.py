"""A reward worker that dies is started again by Ray, and what it was scoring is scored again: in a real cluster."""

import asyncio
import os
import time
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from ray.exceptions import ActorDiedError, ActorUnavailableError
from verl.experimental.reward_loop import RewardLoopManager, RewardLoopWorker

from verl_m2po.patches import verl as verl_patches
from verl_m2po.staleness.heal import reward_workers
from verl_m2po.staleness.watch.liveness import RunActors, Watch

pytestmark = pytest.mark.ray

ORIGINAL = RewardLoopManager._init_reward_loop_workers


@pytest.fixture(scope="module")
def start(cluster):
    """Starts the workers as verl does, inside `ours`."""

    class Worker(reward_workers.RestartableRewardLoopWorker):
        """As verl's, with a reward function that takes a while, or kills."""

        def _init_reward_fn(self) -> None: ...

        async def compute_score(self, data):
            if data == "a response that kills":
                os._exit(1)
            time.sleep(data)
            return os.getpid()

    def start(options=reward_workers.STARTED_AGAIN):
        manager = SimpleNamespace(
            config=OmegaConf.create({"reward": {"num_workers": 1}}),
            reward_router_address=None,
            reward_loop_workers_class=cluster.remote(RewardLoopWorker),
        )
        with verl_patches.reward_workers_of(reward_workers.ActorClass(Worker, options)):
            RewardLoopManager._init_reward_loop_workers(manager)
        return cluster, manager

    return start


def test_what_a_dead_worker_was_scoring_is_scored_by_the_one_in_its_place(start):
    ray, manager = start()
    (worker,) = manager.reward_loop_workers
    watch = Watch()
    watch.add("reward worker", [worker])
    before = ray.get(worker.compute_score.remote(0))
    score = worker.compute_score.remote(1)
    time.sleep(0.3)
    os.kill(before, 9)
    after = ray.get(score)
    assert after != before
    assert watch.find_dead(timeout_s=10) is None
    ray.kill(worker)


def test_a_response_that_kills_every_worker_has_failed_and_the_next_is_scored(start):
    ray, manager = start()
    (worker,) = manager.reward_loop_workers
    with pytest.raises(ActorUnavailableError) as raised:
        ray.get(worker.compute_score.remote("a response that kills"))
    assert not RunActors([worker]).is_death(raised.value), "the trajectory failed, the run goes on"
    assert ray.get(worker.compute_score.remote(0))
    ray.kill(worker)


def test_where_the_run_does_not_heal_a_worker_scores_and_a_dead_one_stays_dead(start):
    ray, manager = start(options={})
    (worker,) = manager.reward_loop_workers
    assert ray.get(worker.compute_score.remote(0))
    with pytest.raises(ActorDiedError):
        ray.get(worker.compute_score.remote("a response that kills"))
    with pytest.raises(ActorDiedError):
        ray.get(worker.compute_score.remote(0))


def test_outside_the_block_verls_workers_are_as_ever():
    with reward_workers.ours(heals=True):
        assert RewardLoopManager._init_reward_loop_workers is not ORIGINAL
    assert RewardLoopManager._init_reward_loop_workers is ORIGINAL


def test_ray_starts_them_again_only_where_the_run_heals(monkeypatch):
    asked = []
    monkeypatch.setattr(reward_workers.verl_patches, "reward_workers_of", lambda of: asked.append(of._options))
    reward_workers.ours(heals=False)
    reward_workers.ours(heals=True)
    assert asked == [{}, reward_workers.STARTED_AGAIN]


def test_what_a_reward_model_says_has_the_fields_that_verls_agent_loop_reads(monkeypatch):
    """verl's agent loop takes both of every score."""

    async def judged(self, data):
        return {"reward_score": 0.7}

    monkeypatch.setattr(RewardLoopWorker, "compute_score_disrm", judged)
    worker = object.__new__(reward_workers.RestartableRewardLoopWorker)
    assert asyncio.run(worker.compute_score_disrm(None)) == {"reward_score": 0.7, "reward_extra_info": {}}
