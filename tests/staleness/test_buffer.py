"""The buffer on a real TransferQueue: every row arrives once, unpacked as verl wrote it, and nothing is left behind."""

import json
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from buffer_runs import (
    BATCH,
    Run,
    as_list,
    assert_rows_are_those_that_were_generated,
    clear,
    is_copy,
    trained_groups,
)
from verl.trainer.ppo.v1.replay_buffer import DAPO_FILTERED_REWARD_COUNTS_KEY
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_m2po.staleness.account.ledger import TrainedRowsLedger, read_ledger
from verl_m2po.staleness.heal.poisoned import PoisonedPrompts
from verl_m2po.staleness.restart.frames import JournalError
from verl_m2po.staleness.restart.journal import Journal
from verl_m2po.staleness.rule.bounded import BoundedAsync
from verl_m2po.staleness.rule.exact import ExactStale
from verl_m2po.staleness.rule.failures import TooManyFailures
from verl_m2po.staleness.rule.records import GroupReport, Selection
from verl_m2po.staleness.rule.replay import Replay
from verl_m2po.staleness.rule.reuse import Reuse
from verl_m2po.staleness.rule.rules import StalenessViolation
from verl_m2po.staleness.watch.liveness import WorkerDied
from verl_m2po.staleness.watch.stop import StopRequested

pytestmark = pytest.mark.ray


def test_replay_trains_the_rows_that_were_generated_again_and_deletes_them_after_their_last_use(transfer_queue):
    steps, reuse = 8, Reuse(max_uses=3, first_uses=1)
    run = Run(transfer_queue, Replay(4, BATCH, reuse), "replay", fail_share=0.2, mask_share=0.3)
    run.buffer.rule.limit(steps)
    trained = []
    for step in range(1, steps + 1):
        trained += run.step(step, check=lambda batch: assert_rows_are_those_that_were_generated(run.tq, batch, 0.3))
        in_store = {key.split("_")[0] for keys in run.tq.kv_list().values() for key in keys}
        assert in_store >= {group.ticket.uid for group in run.buffer.rule.stored_groups()}
    uses = Counter(trained_groups(trained))
    assert sum(uses.values()) == steps * BATCH and max(uses.values()) == 3
    left = [*run.buffer.rule.stored_groups(), *run.buffer.rule.pool.take_retired()]
    assert in_store == {group.ticket.uid for group in left}
    clear(transfer_queue)


@pytest.mark.parametrize(("k", "parts"), [(0, 1), (1, 2), (3, 1)])
def test_exact_stale_trains_every_group_once_at_its_age(transfer_queue, k, parts):
    steps, run = 8, Run(transfer_queue, ExactStale(k, BATCH), f"exact{k}", fail_share=0.2, mask_share=0.3)
    run.buffer.rule.limit(steps)
    trained = []
    check = lambda batch: assert_rows_are_those_that_were_generated(transfer_queue, batch, 0.3)  # noqa: E731
    for step in range(1, steps + 1):
        batches = run.step(step, parts, check)
        for batch in batches:
            versions = {(tag["min_global_steps"], tag["max_global_steps"]) for tag in batch.tags}
            assert versions == {(max(0, step - 1 - k),) * 2}
        trained += trained_groups(batches)
    assert len(trained) == len(set(trained)) == steps * BATCH
    assert not any(transfer_queue.kv_list().values()), "rows were left behind"


@pytest.mark.parametrize("rule", [ExactStale(2, BATCH, most_in_flight=BATCH), BoundedAsync(2, BATCH)])
def test_a_group_without_advantage_is_replaced_and_is_no_failure(transfer_queue, tmp_path, rule):
    steps, path = 8, tmp_path / "rows.jsonl"
    run = Run(transfer_queue, rule, f"filtered {rule.name}", 0.1, TrainedRowsLedger(str(path)), uninformative_share=0.5)
    run.buffer.rule.limit(steps)
    trained, set_aside, failed = [], 0, 0
    for step in range(1, steps + 1):
        trained += trained_groups(run.step(step))
        metrics = run.buffer.step_metrics()
        set_aside += metrics["staleness/evicted_uninformative"]
        failed += metrics["staleness/evicted_failed"]
        assert (
            metrics["staleness/evicted"]
            == metrics["staleness/evicted_uninformative"] + metrics["staleness/evicted_failed"]
        )
        verls = metrics.get("training/filter_groups/evicted_samples", 0)
        assert verls == metrics["staleness/evicted_uninformative"]
        assert metrics[DAPO_FILTERED_REWARD_COUNTS_KEY] == ({1.0: verls} if verls else {})
    assert len(trained) == len(set(trained)) == steps * BATCH
    assert set_aside > BATCH and run.dispatched == steps * BATCH + set_aside + failed
    lines = read_ledger(path)
    recorded = [uid for line in lines for _, uid, _, value in line.get("set_aside", []) if value == 1.0]
    assert not set(recorded) & set(trained) and 0 < len(recorded) == len(set(recorded)) <= set_aside
    if isinstance(rule, ExactStale):
        places = [group[2] for line in lines if "groups" in line for group in line["groups"]]
        assert places == list(range(steps * BATCH)), "each was replaced in its own place"
    assert not any(transfer_queue.kv_list().values()), "rows were left behind"


def test_bounded_async_trains_every_group_once_within_the_bound(transfer_queue):
    steps, run = 8, Run(transfer_queue, BoundedAsync(2, BATCH), "bounded", fail_share=0.2, mask_share=0.3)
    run.buffer.rule.limit(steps)
    trained = []
    check = lambda batch: assert_rows_are_those_that_were_generated(transfer_queue, batch, 0.3)  # noqa: E731
    for step in range(1, steps + 1):
        batches = run.step(step, 2, check)
        assert all(tag["min_global_steps"] >= step - 1 - 2 for batch in batches for tag in batch.tags)
        trained += trained_groups(batches)
    assert len(trained) == len(set(trained)) == steps * BATCH
    assert not any(transfer_queue.kv_list().values()), "rows were left behind"


@pytest.mark.parametrize("rule", [ExactStale(0, BATCH), ExactStale(1, BATCH), BoundedAsync(1, BATCH)])
def test_while_the_training_devices_are_lent_a_part_of_the_next_batch_is_waited_for(transfer_queue, rule):
    run = Run(transfer_queue, rule, "lent")
    rule.limit(3)
    for step in range(1, 4):
        there, metrics = run.buffer.wait_for_sampleable(step, "train", BATCH // 2)
        assert BATCH // 2 <= len(there) <= BATCH and metrics == {}
        assert len(run.buffer.wait_for_sampleable(step, "train", BATCH)[0]) == BATCH
        assert len(trained_groups(run.step(step))) == BATCH
    assert run.buffer.get_sampleable_count(4, "train") == 0


@pytest.mark.parametrize("mask_share", [0.0, 0.5])
def test_over_age_tokens_leave_the_masks(transfer_queue, mask_share):
    run = Run(transfer_queue, BoundedAsync(1, BATCH, min_usable_share=0.0), "masked", mask_share=mask_share)
    run.buffer.pump()
    run.buffer.wait_until(lambda: run.buffer.rule.ready == 2 * BATCH, "both batches")
    # What is ready is of version 0, all of it over age; a new generation that began with version 0 is over age in part.
    run.workers.spans = lambda tokens, version: ((0, 1), (version, tokens - 1)) if tokens > 1 else ((version, 1),)
    run.buffer.advance(1)
    run.buffer.advance(2)
    batch, _ = run.buffer.sample(3, "train", BATCH)
    data = transfer_queue.kv_batch_get(keys=batch.keys, partition_id="train")
    copies = [is_copy(key, mask_share) for key in batch.keys]
    masks, loss_masks = data["response_mask"].unbind(), data["loss_mask"].unbind()
    for mask, loss_mask, copied in zip(masks, loss_masks, copies, strict=True):
        tokens = len(mask)
        expected = [0] * tokens if copied else [0] + [1] * (tokens - 1) if tokens > 1 else [1]
        assert mask.tolist() == loss_mask.tolist() == expected
    metrics = run.buffer.step_metrics()
    assert metrics["staleness/evicted_dropped"] == 2 * BATCH
    of_its_own = [mask for mask, copied in zip(masks, copies, strict=True) if not copied]
    assert metrics["staleness/over_age_tokens"] == sum(int(mask[0] == 0) for mask in of_its_own)
    assert metrics["staleness/trained_tokens"] == sum(int(mask.sum()) for mask in masks)
    assert (metrics["staleness/masked_trajectories"] > 0) == any(copies) == (mask_share > 0)
    transfer_queue.kv_clear(keys=batch.keys, partition_id=batch.partition_id)


def test_a_restart_continues_where_the_checkpoint_was(transfer_queue, tmp_path):
    """Saved while the batch just trained is still there and groups are in flight; both are dealt with on load."""
    whole = Run(transfer_queue, ExactStale(2, BATCH), "resumed", mask_share=0.3)
    for step in range(1, 4):
        whole.step(step)
    batch, _ = whole.buffer.sample(4, "train", BATCH)
    whole.buffer.settle()
    state = json.loads(json.dumps(whole.buffer.state_dict()))
    waiting = [group[0][0] for group in state["rule"]["ready"]]
    transfer_queue.save_checkpoint(tmp_path / "tq")

    for partition, rows in transfer_queue.kv_list().items():  # what a crash does
        if rows:
            transfer_queue.kv_clear(keys=list(rows), partition_id=partition)
    transfer_queue.load_checkpoint(tmp_path / "tq")
    again = Run(transfer_queue, ExactStale(2, BATCH), "after", mask_share=0.3)
    again.buffer.load_state_dict(state, version=4)
    again.buffer.begin(4)
    assert not transfer_queue.kv_list().get(batch.partition_id), "the trained batch came back"
    trained = []
    for step in (5, 6, 7):
        check = lambda batch: assert_rows_are_those_that_were_generated(transfer_queue, batch, 0.3)  # noqa: E731
        (resumed,) = again.step(step, check=check)
        assert {tag["min_global_steps"] for tag in resumed.tags} == {step - 1 - 2}
        trained.append(trained_groups([resumed]))
    assert sorted(trained[0] + trained[1]) == sorted(waiting)
    assert all(uid.startswith("after-") for uid in trained[2])
    again.buffer.settle()
    for partition, rows in transfer_queue.kv_list().items():
        if rows:
            transfer_queue.kv_clear(keys=list(rows), partition_id=partition)


def go_on(again: Run, journal: Journal, position: dict, state: dict | None, saved: int) -> None:
    """As the trainer does after a crash: from checkpoint `saved` (0 for none), and what the journal has since."""
    if state is not None:
        again.buffer.load_state_dict(state, version=saved)
    in_flight = [ticket.uid for ticket in again.buffer.rule.in_flight_tickets()]
    again.buffer.backlog.replay(journal.read(position["segment"], saved, in_flight, ["some"]), again.draw)
    journal.start(position["run"])
    again.buffer.begin(saved)
    tickets, prompts = again.buffer.reopen_groups()
    if tickets:
        again.regenerate(tickets, prompts)
    again.buffer.pump()


@pytest.mark.parametrize(("saved", "stopped", "left"), [(0, 0, 5), (2, 2, 1), (2, 4, 0), (2, 5, 3), (6, 7, 2)])
@pytest.mark.parametrize("make_rule", [lambda: ExactStale(2, BATCH), lambda: BoundedAsync(2, BATCH)])
def test_with_a_journal_a_crash_loses_only_what_was_being_generated(
    transfer_queue, tmp_path, make_rule, saved, stopped, left
):
    """Checkpoint after `saved` steps, crash after `stopped`, when `left` groups of the next weights have finished."""
    steps, settings = 9, {"some": "setting"}
    journal = Journal(tmp_path / "journal", False, settings)
    journal.start(None)
    lost = Run(
        *(transfer_queue, make_rule(), f"lost{saved}{stopped}"),
        fail_share=0.1,
        journal=journal,
        mask_share=0.3,
        uninformative_share=0.2,
    )
    lost.buffer.rule.limit(steps)
    lost.buffer.begin(0)
    state, position, drawn, trained = None, journal.position(), 0, {}
    for step in range(1, stopped + 1):
        if step == stopped and saved < stopped:
            lost.buffer.settle()
            lost.workers.left = left + 100
        trained[step] = trained_groups(lost.step(step))
        if step == saved:
            lost.buffer.settle()
            state, drawn = json.loads(json.dumps(lost.buffer.state_dict())), lost.dispatched
            journal.next_segment()
            position = journal.position()
            transfer_queue.save_checkpoint(tmp_path / "tq")
    lost.workers.left = left
    lost.buffer.pump()
    time.sleep(0.3)
    finished = set(lost.workers.generated)
    clear(transfer_queue)  # what a crash does

    journal = Journal(tmp_path / "journal", False, settings)
    again = Run(
        *(transfer_queue, make_rule(), f"again{saved}{stopped}"),
        journal=journal,
        mask_share=0.3,
        uninformative_share=0.2,
    )
    again.buffer.rule.limit(steps)
    again.dispatched = drawn
    if state is not None:
        transfer_queue.load_checkpoint(tmp_path / "tq")
    go_on(again, journal, position, state, saved)
    check = lambda batch: assert_rows_are_those_that_were_generated(transfer_queue, batch, 0.3)  # noqa: E731
    uids = [uid for step in range(1, saved + 1) for uid in trained[step]]
    for step in range(saved + 1, steps + 1):
        (batch,) = again.step(step, check=check)
        groups = trained_groups([batch])
        uids += groups
        ages = {step - 1 - tag["min_global_steps"] for tag in batch.tags}
        if isinstance(again.buffer.rule, ExactStale):
            assert ages == {min(step - 1, 2)}
            assert step > stopped or groups == trained[step], "the redone step trains on the same batch"
        else:
            assert min(ages) >= 0 and max(ages) <= 2
    assert len(uids) == len(set(uids)) == steps * BATCH
    prompts = [int(uid.rsplit("-", 1)[1]) for uid in uids]
    assert len(set(prompts)) == steps * BATCH, "a prompt was trained twice"
    assert not finished & set(again.workers.generated), "what was in the journal was generated again"
    clear(transfer_queue)


@pytest.mark.parametrize(("saved", "stopped", "left"), [(0, 3, 1), (2, 5, 1), (5, 6, 0)])
def test_with_a_journal_a_crash_of_the_mode_replay_is_made_up_for(transfer_queue, tmp_path, saved, stopped, left):
    """The steps since the checkpoint train the same batches once more, and the uses of a lost step do not count."""
    steps, settings, reuse = 9, {"some": "setting"}, Reuse(max_uses=5, first_uses=2)
    journal = Journal(tmp_path / "journal", False, settings)
    journal.start(None)
    lost = Run(transfer_queue, Replay(4, BATCH, reuse), "lost", fail_share=0.2, journal=journal, mask_share=0.3)
    lost.buffer.rule.limit(steps)
    lost.buffer.begin(0)
    state, position, drawn, trained = None, journal.position(), 0, {}
    for step in range(1, stopped + 1):
        trained[step] = trained_groups(lost.step(step))
        if step == saved:
            state, drawn = json.loads(json.dumps(lost.buffer.state_dict())), lost.dispatched
            journal.next_segment()
            position = journal.position()
            transfer_queue.save_checkpoint(tmp_path / "tq")
    lost.workers.left = left
    lost.buffer.pump()
    time.sleep(0.3)
    finished = set(lost.workers.generated)
    clear(transfer_queue)  # what a crash does

    journal = Journal(tmp_path / "journal", False, settings)
    again = Run(transfer_queue, Replay(4, BATCH, reuse), "again", journal=journal, mask_share=0.3)
    again.buffer.rule.limit(steps)
    again.dispatched = drawn
    if state is not None:
        transfer_queue.load_checkpoint(tmp_path / "tq")
    go_on(again, journal, position, state, saved)
    check = lambda batch: assert_rows_are_those_that_were_generated(transfer_queue, batch, 0.3)  # noqa: E731
    uses = Counter(uid for step in range(1, saved + 1) for uid in trained[step])
    for step in range(saved + 1, steps + 1):
        (batch,) = again.step(step, check=check)
        groups = trained_groups([batch])
        assert step > stopped or groups == trained[step], "the redone step trains on the same batch"
        assert len(set(groups)) == BATCH and sum(uid not in uses for uid in groups) >= reuse.first_uses
        assert all(step - 1 - tag["min_global_steps"] <= 4 for tag in batch.tags)
        uses.update(groups)
    assert sum(uses.values()) == steps * BATCH and 1 < max(uses.values()) <= 5
    assert not finished & set(again.workers.generated), "what was in the journal was generated again"
    clear(transfer_queue)


def test_in_the_mode_replay_a_group_without_advantage_is_replaced_and_never_trained(transfer_queue, tmp_path):
    path, steps = tmp_path / "rows.jsonl", 8
    rule = Replay(4, BATCH, Reuse(None, 2))
    run = Run(transfer_queue, rule, "filtered", 0.1, TrainedRowsLedger(str(path)), uninformative_share=0.5)
    rule.limit(steps)
    trained, set_aside, failed = [], 0, 0
    for step in range(1, steps + 1):
        trained += trained_groups(run.step(step))
        metrics = run.buffer.step_metrics()
        set_aside += metrics["staleness/evicted_uninformative"]
        failed += metrics["staleness/evicted_failed"]
    assert len(trained) == steps * BATCH and set_aside > 0
    assert run.dispatched == len(set(trained)) + set_aside + failed
    recorded = {uid for line in read_ledger(path) for _, uid, _, _ in line.get("set_aside", [])}
    assert recorded and not recorded & set(trained)
    clear(transfer_queue)


def test_another_data_set_than_that_of_the_journal_is_refused(transfer_queue, tmp_path):
    journal = Journal(tmp_path, False, {})
    journal.start(None)
    run = Run(transfer_queue, ExactStale(0, BATCH), "other-data", journal=journal)
    run.buffer.settle()
    again = Run(transfer_queue, ExactStale(0, BATCH), "x")
    again.dispatched = 7
    with pytest.raises(JournalError, match="dispatched prompt 0 at place 0, where the data set now gives prompt 7"):
        again.buffer.backlog.replay(journal.read(1, 0, [], []), again.draw)
    clear(transfer_queue)


def test_a_checkpoint_that_lacks_rows_is_refused(transfer_queue):
    run = Run(transfer_queue, ExactStale(1, BATCH), "lost")
    run.buffer.settle()
    state = run.buffer.state_dict()
    for partition, rows in transfer_queue.kv_list().items():
        if rows:
            transfer_queue.kv_clear(keys=list(rows), partition_id=partition)
    with pytest.raises(RuntimeError, match=r"lacks .* buffered rows"):
        Run(transfer_queue, ExactStale(1, BATCH), "x").buffer.load_state_dict(state, version=0)
    with pytest.raises(ValueError, match="format 0"):
        run.buffer.load_state_dict(state | {"state_version": 0}, version=0)


def test_groups_in_flight_at_the_checkpoint_start_again(transfer_queue):
    run = Run(transfer_queue, BoundedAsync(1, BATCH), "inflight")
    run.workers.start = lambda tickets: None  # they never finish
    run.buffer.pump()
    state = run.buffer.state_dict()
    again = Run(transfer_queue, BoundedAsync(1, BATCH), "other")
    again.buffer.load_state_dict(state, version=3)
    again.buffer.begin(3)
    tickets, prompts = again.buffer.reopen_groups()
    assert [ticket.uid for ticket in tickets] == as_list(prompts["uid"]) == [f"inflight-{i}" for i in range(8)]
    assert {ticket.dispatch_version for ticket in tickets} == {3}
    assert prompts["index"].tolist() == list(range(8))
    again.workers.version = 3
    again.workers.start(tickets)
    (batch,) = again.step(4)
    assert {tag["min_global_steps"] for tag in batch.tags} == {3}
    for partition, rows in transfer_queue.kv_list().items():
        if rows:
            transfer_queue.kv_clear(keys=list(rows), partition_id=partition)


def test_the_wrong_version_stops_the_run_with_a_report(transfer_queue):
    run = Run(transfer_queue, ExactStale(1, BATCH), "wrong")
    run.workers.spans = lambda tokens, version: ((version + 1, tokens),)
    with pytest.raises(StalenessViolation, match=r"must come from weight version 0, but row wrong-\d+_0_0"):
        run.buffer.settle()


def test_too_many_failures_stop_the_run(transfer_queue):
    run = Run(transfer_queue, ExactStale(0, BATCH), "failing", fail_share=1.0, max_failed_fraction=0.2)
    with pytest.raises(TooManyFailures, match="10 x ValueError: this one fails"):
        run.buffer.sample(1, "train", BATCH)


def test_what_is_lost_with_a_process_ends_the_run_and_not_its_prompts(transfer_queue, tmp_path):
    """Were these groups replaced as failed ones are, a restart would skip their prompts."""
    journal = Journal(tmp_path, False, {})
    journal.start(None)
    run = Run(transfer_queue, ExactStale(0, BATCH), "lost", journal=journal)
    run.workers.has_lost_its_server = True
    with pytest.raises(WorkerDied, match=r"group lost-\d+ cannot be generated.*ActorDiedError"):
        run.buffer.sample(1, "train", BATCH)
    assert run.dispatched == run.buffer.rule.in_flight == BATCH
    assert [kind for kind, _ in journal.read(1, 0, [], []).events] == ["dispatched"]
    clear(transfer_queue)


def test_too_many_masked_trajectories_stop_the_run_as_well(transfer_queue):
    run = Run(transfer_queue, BoundedAsync(3, BATCH), "half", mask_share=1.0, max_failed_fraction=0.4)
    with pytest.raises(TooManyFailures, match=r"^5 of the last 10 prompt groups failed.*\n  10 x TimeoutError: slow$"):
        run.buffer.wait_until(lambda: False, "it stops by itself")
    assert run.buffer.step_metrics()["staleness/masked_trajectories"] == 10
    assert run.buffer.rule.ready == 10, "what is masked is kept"
    clear(transfer_queue)


def test_a_run_that_is_asked_to_end_waits_for_no_generation(transfer_queue):
    run = Run(transfer_queue, ExactStale(0, BATCH), "endless")
    run.workers.start = lambda tickets: None  # they never finish
    run.is_asked_to_end = True
    with pytest.raises(StopRequested, match="a batch of 4 groups is not there yet"):
        run.buffer.sample(1, "train", BATCH)
    with pytest.raises(StopRequested, match="the present weights still have to generate"):
        run.buffer.settle()
    assert run.buffer.rule.in_flight == BATCH, "what is in flight is saved, to be generated again"


def test_the_ledger_has_every_row_before_it_is_trained(transfer_queue, tmp_path):
    run = Run(transfer_queue, ExactStale(1, BATCH), "ledger", ledger=TrainedRowsLedger(str(tmp_path / "rows.jsonl")))
    (batch,) = run.step(1)
    (line,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert (line["step"], line["version"], line["oldest_version"]) == (1, 0, None)
    assert [row[0] for group in line["groups"] for row in group[3]] == batch.keys
    run.buffer.settle()


def test_validation_goes_verls_way_and_sees_only_its_own_rows(transfer_queue):
    run = Run(transfer_queue, ExactStale(1, BATCH), "val")
    run.buffer.settle()
    uids = ["va", "vb"]
    tags = [{"is_prompt": True, "status": "pending", "global_steps": 0} for _ in uids]
    transfer_queue.kv_batch_put(keys=uids, partition_id="val", tags=tags)
    for uid in uids:
        fields = list_of_dict_to_tensordict([{"responses": torch.arange(3)}])
        tag = {"status": "success", "seq_len": 3}
        transfer_queue.kv_batch_put(keys=[f"{uid}_0_0"], partition_id="val", fields=fields, tags=[tag])
        transfer_queue.kv_put(key=uid, partition_id="val", tag={"status": "finished"})
    batch, _ = run.buffer.sample(0, "val", 2)
    assert sorted(batch.keys) == ["va_0_0", "vb_0_0"] and batch.partition_id == "val"
    assert set(run.buffer.partitions) == {"val"}
    transfer_queue.kv_clear(keys=batch.keys, partition_id="val")


class EveryBatchTwice(BoundedAsync):
    """Hands out each batch at two steps in a row."""

    kept = ()

    def select(self, version, count):
        if self.kept:
            groups, self.kept = self.kept, ()
            return Selection(groups, None)
        selection = super().select(version, count)
        if selection is None or not selection.groups:
            return selection
        self.kept = selection.groups
        return replace(selection, kept=frozenset(group.ticket.uid for group in selection.groups))


def test_what_the_rule_keeps_is_trained_again_and_then_leaves(transfer_queue):
    run = Run(transfer_queue, EveryBatchTwice(3, BATCH), "twice", mask_share=0.3)
    check = lambda batch: assert_rows_are_those_that_were_generated(transfer_queue, batch, 0.3)  # noqa: E731
    (first,), (second,), (third,) = (run.step(step, check=check) for step in (1, 2, 3))
    assert first.keys == second.keys and not set(first.keys) & set(third.keys)
    left = {key for rows in transfer_queue.kv_list().values() for key in rows}
    assert not set(first.keys) & left, "rows that were used up are still there"
    assert set(third.keys) <= left, "rows that are kept are gone"
    clear(transfer_queue)


@pytest.mark.parametrize("make_rule", [lambda: ExactStale(2, BATCH), lambda: BoundedAsync(2, BATCH)])
def test_groups_that_deaths_have_lost_are_generated_again_in_their_places(transfer_queue, make_rule):
    """Half of the generations are lost with processes that are replaced, some groups twice, with rows stored."""
    steps, rule = 12, make_rule()
    run = Run(transfer_queue, rule, "moved")
    run.workers.lose_share = 0.5
    rule.limit(steps)
    run.buffer.begin(0)
    batches = []
    for step in range(1, steps + 1):
        batches += run.step(step, check=lambda batch: assert_rows_are_those_that_were_generated(transfer_queue, batch))
    trained = trained_groups(batches)
    assert sorted(trained) == sorted(f"moved-{index}" for index in range(steps * BATCH))
    assert len(run.workers.lost) > BATCH and max(run.workers.lost.values()) == 2
    if isinstance(rule, ExactStale):
        assert trained == [f"moved-{index}" for index in range(steps * BATCH)], "each in its place"
        versions = [{tag["min_global_steps"] for tag in batch.tags} for batch in batches]
        assert versions == [{max(0, step - 2)} for step in range(steps)]
    assert run.buffer.step_metrics()["staleness/poisoned"] == 0


def test_a_prompt_that_kills_what_generates_it_is_set_aside_and_replaced(transfer_queue, caplog, tmp_path):
    rule, path = ExactStale(1, BATCH), tmp_path / "saved" / "poisoned.jsonl"
    run = Run(transfer_queue, rule, "killed", poisoned=PoisonedPrompts(path))
    rule.limit(3)
    kill = run.workers._generate

    def generate(ticket, version: int) -> None:
        if ticket.prompt_index == 3:
            run.workers.lost[ticket.uid] += 1
            report = GroupReport(ticket.uid, (), "ServerDied: it died", was_lost=True, deaths=2)
            run.workers._reports.put(report)
        else:
            kill(ticket, version)

    run.workers._generate = generate
    run.buffer.begin(0)
    trained = trained_groups([batch for step in range(1, 4) for batch in run.step(step)])
    assert len(trained) == 3 * BATCH and "killed-3" not in trained
    assert run.workers.lost == {"killed-3": 2}
    assert "prompt 3 kills what generates it" in caplog.text
    metrics = run.buffer.step_metrics()
    assert metrics["staleness/poisoned"] == metrics["staleness/evicted_failed"] == 1
    # Another start of the same run does not try it, a new run does.
    path.open("a").write("12")  # cut off by a crash
    again = Run(transfer_queue, ExactStale(1, BATCH), "again", poisoned=PoisonedPrompts(path))
    again.buffer.rule.limit(3)
    again.buffer.begin(0)
    trained = trained_groups([batch for step in range(1, 4) for batch in again.step(step)])
    assert len(trained) == 3 * BATCH and "again-3" not in trained and "again-3" not in again.workers.generated
    assert again.buffer.step_metrics()["staleness/evicted_failed"] == 1
    assert not PoisonedPrompts(path, goes_on=False).has(3) and not path.exists()
