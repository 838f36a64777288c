"""Dynamic sampling on a real TransferQueue: ours and the buffer of verl's `sync` filter the same groups."""

import random

import pytest
import torch
from buffer_runs import BATCH, RESPONSES, Run, Workers, clear, trained_groups
from omegaconf import DictConfig
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_m2po.staleness.rollout.informative import shared_metric
from verl_m2po.staleness.rule.events import SetAside
from verl_m2po.staleness.rule.exact import ExactStale

pytestmark = pytest.mark.ray

STEPS = 6


def accuracy(seed: int, index: int, session: int) -> float:
    """What the reward function says of a trajectory, the same for both."""
    return float(random.Random(f"{seed}/{index}/{session}").randrange(2))


def has_advantage(seed: int, index: int) -> bool:
    return len({accuracy(seed, index, session) for session in range(RESPONSES)}) > 1


class Verls:
    """verl's buffer, and prompts whose responses are there as soon as they are dispatched."""

    def __init__(self, tq, seed: int) -> None:
        self.tq, self.seed, self.dispatched, self.step = tq, seed, 0, 1
        self.buffer = ReplayBuffer(
            trainer_mode="sync",
            trainer_config=DictConfig({}),
            max_off_policy_threshold=None,
            max_off_policy_strategy="drop",
            sampler_kwargs=DictConfig({}),
            poll_interval=0.01,
            refill_fn=self.dispatch,
            filter_groups_metric="acc",
            train_batch_size=BATCH,
            gen_batch_size=1,
        )

    def dispatch(self, groups: int) -> None:
        for index in range(self.dispatched, self.dispatched + groups):
            rows = [
                {
                    "responses": torch.tensor([session]),
                    "extra_fields": {"reward_extra_info": {"acc": accuracy(self.seed, index, session)}},
                }
                for session in range(RESPONSES)
            ]
            keys = [f"v-{index}_{session}_0" for session in range(RESPONSES)]
            fields = list_of_dict_to_tensordict(rows)
            self.tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=[{"status": "success"}] * 2)
            tag = {"is_prompt": True, "status": "finished", "global_steps": self.step}
            self.tq.kv_batch_put(keys=[f"v-{index}"], partition_id="train", tags=[tag])
        self.dispatched += groups

    def train(self) -> tuple[set[int], dict]:
        self.dispatch(BATCH)
        batch, metrics = self.buffer.sample(self.step, "train", BATCH)
        self.tq.kv_clear(keys=batch.keys, partition_id="train")
        self.step += 1
        return {int(key.split("_")[0].removeprefix("v-")) for key in batch.keys}, metrics


class Judged(Workers):
    """Workers whose groups are judged as those of a run are."""

    seed = 0

    def _fields(self, ticket, session: int) -> dict:
        info = {"reward_extra_info": {"acc": accuracy(self.seed, ticket.prompt_index, session)}}
        return super()._fields(ticket, session) | {"extra_fields": info}

    def _shared_metric(self, rows) -> float | None:
        return shared_metric(rows, "acc")


class SetAsides:
    """Prompts that were set aside."""

    def __init__(self) -> None:
        self.indices: list[int] = []

    def on_event(self, event) -> None:
        if isinstance(event, SetAside):
            self.indices.append(event.ticket.prompt_index)


@pytest.mark.parametrize("seed", [1, 2])
def test_what_verls_synchronous_mode_filters_is_set_aside_and_what_it_trains_is_trained(transfer_queue, seed):
    """verl fetches twice as many prompts as it filters, and throws the surplus away; here each is replaced by one."""
    verls = Verls(transfer_queue, seed)
    trained, metrics = zip(*(verls.train() for _ in range(STEPS)), strict=True)
    clear(transfer_queue)

    rule, aside = ExactStale(0, BATCH), SetAsides()
    rule.limit(STEPS)
    ours = Run(transfer_queue, rule, f"s{seed}", workers=Judged, ledger=aside)
    ours.workers.seed = seed
    batches = [batch for step in range(1, STEPS + 1) for batch in ours.step(step)]
    clear(transfer_queue)

    good = [index for index in range(verls.dispatched) if has_advantage(seed, index)]
    of_name = [int(uid.removeprefix(f"s{seed}-")) for uid in trained_groups(batches)]
    assert sorted(of_name) == good[: STEPS * BATCH], "one for one, so that no prompt with an advantage is lost"
    assert sorted(aside.indices) == [i for i in range(ours.dispatched) if not has_advantage(seed, i)]

    verl_trained = set.union(*trained)
    discarded = sum(each.get("training/filter_groups/discarded_surplus_samples", 0) for each in metrics)
    filtered = sum(each.get("training/filter_groups/evicted_samples", 0) for each in metrics)
    assert verl_trained <= set(good) and len(verl_trained) == STEPS * BATCH == len(good) - discarded
    assert filtered == verls.dispatched - len(good) > 0
    seen_by_both = range(min(verls.dispatched, ours.dispatched))
    assert not verl_trained.intersection(aside.indices)
    assert {i for i in seen_by_both if i in aside.indices} == {i for i in seen_by_both if not has_advantage(seed, i)}
