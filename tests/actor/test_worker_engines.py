"""The decision of the actor worker on engines that need a GPU, with a stand-in for them."""

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
from actor_worker_runs import as_data, rollouts
from verl.workers.config import FSDPActorConfig
from verl.workers.utils.losses import ppo_loss

from verl_m2po.actor.worker import M2POTrainingWorker
from verl_m2po.losses.config import M2POPolicyLossConfig
from verl_m2po.losses.kernel.mini_batch import MiniBatch

ROWS = 4


class StageWithoutOutputs:
    """A pipeline stage before the last: verl's Megatron engine calls a loss on the last alone."""

    # A collective on it would fail.
    group = object()

    def get_data_parallel_group(self):
        return self.group

    def eval_mode(self, **unused):
        return contextlib.nullcontext()

    def infer_batch(self, data, loss_function):
        pass


def worker(engine, **engine_settings):
    made = object.__new__(M2POTrainingWorker)
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        use_dynamic_bsz=True,
        policy_loss=M2POPolicyLossConfig(selected="m2po"),
    )
    made.engine, made.loss_fn = engine, functools.partial(ppo_loss, config=config)
    settings = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2, "max_token_len_per_gpu": None}
    made.engine_config = SimpleNamespace(use_fused_kernels=False, **{**settings, **engine_settings})
    made.model_config = {}
    return made


def decide(made, data):
    mini_batch = MiniBatch()
    made._decide(data, made.loss_fn.keywords["config"], mini_batch)
    return mini_batch


def mini_batch_data():
    rows = rollouts(ROWS, seed=0)
    return as_data(rows, [torch.zeros(len(row["noise"])) for row in rows], ROWS)


def test_pipeline_stage_without_outputs_decides_nothing_and_waits_for_nobody():
    mini_batch = decide(worker(StageWithoutOutputs()), mini_batch_data())
    assert mini_batch.decision is None and not mini_batch.decide_in_loss


def test_group_without_each_token_once_is_refused():
    with pytest.raises(NotImplementedError, match=r"policy_loss\.m2po\.scope=mini_batch.*dynamic_context_parallel"):
        decide(worker(StageWithoutOutputs(), dynamic_context_parallel=True), mini_batch_data())


def test_engine_that_may_split_further_is_looked_at_ahead_of_the_loss():
    # All tokens fit into one micro-batch, but only verl's FSDP engine promises that there will be one.
    made = worker(StageWithoutOutputs(), use_dynamic_bsz=True, max_token_len_per_gpu=10_000)
    assert not made._is_one_micro_batch(mini_batch_data())
