"""What the rollout side reports: which weights generated which tokens, and what is refused."""

import asyncio
import contextlib
import contextvars
import math
from collections.abc import Collection
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from verl_m2po.staleness.restart.frames import JournalError, RowsWriter, decode, read_frames
from verl_m2po.staleness.rollout import client
from verl_m2po.staleness.rollout.agent_loop import StalenessAgentLoopWorker
from verl_m2po.staleness.rollout.client import GenerationAborted, Session, SpanRecordingClient, current_session
from verl_m2po.staleness.rollout.outputs import check_output, spans_of
from verl_m2po.staleness.rows import media
from verl_m2po.staleness.rows.store import LOT_FIELD
from verl_m2po.staleness.watch.liveness import RunActors, ServerDied


def output(mask: list[int], log_probs: list[float] | None = None, reward: float | None = 1.0) -> AgentLoopOutput:
    return AgentLoopOutput(
        prompt_ids=[1, 2],
        response_ids=list(range(len(mask))),
        response_mask=mask,
        response_logprobs=log_probs,
        reward_score=reward,
        metrics=AgentLoopMetrics(),
    )


def session(*spans: tuple[int, int]) -> Session:
    return Session(spans=[list(span) for span in spans])


def test_spans_cover_the_generated_tokens_in_order():
    assert spans_of(session((3, 2), (4, 3)), output([1] * 5)) == ((3, 2), (4, 3))


def test_spans_skip_tool_tokens():
    assert spans_of(session((3, 2), (4, 3)), output([1, 1, 0, 0, 1, 1, 1])) == ((3, 2), (4, 3))


def test_spans_are_cut_with_the_response():
    assert spans_of(session((3, 2), (4, 3)), output([1] * 3)) == ((3, 2), (4, 1))
    assert spans_of(session((3, 2), (4, 3)), output([1] * 2)) == ((3, 2),)


@pytest.mark.parametrize("mask", [[1] * 9, [1, 0, 1]], ids=["more than generated", "less, with tool tokens between"])
def test_unknown_provenance_counts_as_the_oldest(mask):
    assert spans_of(session((3, 2), (4, 3)), output(mask)) == ((3, sum(mask)),)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (output([]), "empty response"),
        (output([0, 0], [-1.0, -1.0]), "empty response"),
        (output([1] * 3, [-1.0] * 3).model_copy(update={"response_mask": [1]}), "a mask of 1 for 3"),
        (output([1] * 9, [-1.0] * 9), "9 tokens, more than the 8"),
        (output([1] * 3), "no behaviour log-probs for 3"),
        (output([1] * 3, [-1.0]), "1 behaviour log-probs for 3"),
        (output([1] * 2, [-1.0, math.nan]), "not finite"),
        (output([1] * 2, [-1.0, math.inf]), "not finite"),
        (output([1] * 2, [-1.0, -math.inf]), "not finite"),
        (output([1] * 2, [-1.0, -2.0], reward=math.nan), "reward nan is not finite"),
    ],
)
def test_what_must_not_be_trained_on_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        check_output(bad, needs_log_probs=True, max_response_tokens=8)


def test_a_reward_function_that_returns_nothing_is_refused():
    with pytest.raises(ValueError, match="returned nothing"):
        check_output(output([1], [-1.0], reward=None), True, 8, needs_reward=True)


def test_a_good_response_passes():
    check_output(output([1, 0, 1], [-1.0, 0.0, -2.0]), needs_log_probs=True, max_response_tokens=3)
    check_output(output([1], reward=None), needs_log_probs=False, max_response_tokens=3)


class FakeServer:
    """Answers each attempt with the next scripted (version, tokens, stop reason)."""

    def __init__(self, *attempts: tuple[int | None, int, str]) -> None:
        self._attempts = list(attempts)
        self.aborted: list[str] = []
        self.generate = SimpleNamespace(remote=self._generate)
        self.abort_request = self.generate  # that there is one tells vLLM's server from others
        handler = SimpleNamespace(get_loop=asyncio.get_running_loop)
        self.engine = SimpleNamespace(abort=self._abort, output_handler=handler)
        self.__ray_call__ = SimpleNamespace(remote=lambda what, *args: what(self, *args))
        self.on_generate = lambda: None
        self.asked: list[tuple[int, int]] = []

    async def _abort(self, requests: list[str]) -> None:
        self.aborted += requests

    async def _generate(self, prompt_ids, sampling_params, **_) -> TokenOutput:
        self.asked.append((len(prompt_ids), sampling_params["max_tokens"]))
        self.on_generate()
        await asyncio.to_thread(int)  # the loop's next turn, in which what is given up is aborted
        version, tokens, stop_reason = self._attempts.pop(0)
        return TokenOutput(
            token_ids=[7] * tokens,
            log_probs=[-1.0] * tokens,
            num_preempted=0,
            stop_reason=stop_reason,
            extra_fields={"global_steps": version},
        )


@pytest.fixture
def generate(monkeypatch):
    """Runs one generation of the real client against a scripted server; returns (output, session)."""

    async def refuse_to_wait(_seconds):
        raise AssertionError("the servers park a request until they have the new weights; nobody need wait here")

    def run(server: FakeServer, of: Session | None) -> TokenOutput:
        config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(name="vllm")))
        client = SpanRecordingClient(config=config)

        async def acquire(self, request_id, **_):
            return "server", server

        monkeypatch.setattr(LLMServerClient, "_acquire_server", acquire)
        monkeypatch.setattr(LLMServerClient, "_release_server", lambda *_, **__: None)
        monkeypatch.setattr("verl.workers.rollout.llm_server.asyncio.sleep", refuse_to_wait)

        async def body():
            current_session.set(of)
            return await client.generate("r", prompt_ids=[1], sampling_params={"max_tokens": 50})

        return contextvars.copy_context().run(asyncio.run, body())

    return run


def test_every_attempt_of_an_interrupted_generation_is_recorded(generate):
    of, server = Session(), FakeServer((2, 3, "aborted"), (3, 4, "aborted"), (3, 1, "stop"))
    result = generate(server, of)
    assert of.spans == [[2, 3], [3, 5]]
    assert len(result.token_ids) == len(result.log_probs) == of.generated_tokens == 8
    assert result.stop_reason == "stop" and result.num_preempted == 0
    assert server.asked == [(1, 50), (4, 47), (8, 43)], "it goes on after what it has, within its first budget"


def test_an_interruption_at_the_last_token_of_the_budget_ends_the_generation(generate):
    of = Session()
    assert generate(FakeServer((2, 20, "aborted"), (3, 30, "aborted")), of).stop_reason == "length"
    assert of.spans == [[2, 20], [3, 30]]


def test_a_server_that_refuses_again_is_not_asked_without_end(generate, monkeypatch):
    """One on the training devices, which are lent, is known to the balancer before it serves."""
    waits = []

    async def wait(seconds):
        waits.append(seconds)

    monkeypatch.setattr(client, "asyncio", SimpleNamespace(sleep=wait))
    of, refused = Session(), (2, 0, "aborted")
    assert generate(FakeServer(refused, refused, refused, (3, 5, "aborted"), refused, (3, 1, "stop")), of)
    assert of.spans == [[3, 6]] and waits == [client.REFUSED_WAIT_S] * 2


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_a_generation_in_parts_keeps_the_experts_that_each_part_was_generated_with(prompt, parts):
    """A row for each token that was fed, by its place; the last one of a part is fed by the next. Two layers."""

    def part(number: int, before: int, tokens: int) -> TokenOutput:
        fed = [[[number], [place]] for place in range(before + tokens - 1)]
        return TokenOutput(token_ids=[0] * tokens, routed_experts=np.array(fed).reshape(-1, 2, 1))

    joined, length = part(0, prompt, parts[0]), prompt + parts[0]
    for number, tokens in enumerate(parts[1:], start=1):
        joined = client._joined(joined, part(number, length, tokens))
        length += tokens
    numbers, places = joined.routed_experts[:, 0, 0].tolist(), joined.routed_experts[:, 1, 0].tolist()
    assert places == list(range(length - 1))
    assert numbers == sorted([*[0] * (prompt - 1), *chain.from_iterable([n] * t for n, t in enumerate(parts))])


def test_an_attempt_without_tokens_leaves_no_version(generate):
    """Parked behind a weight update before its first token: generated by the new weights alone."""
    of = Session()
    generate(FakeServer((2, 0, "aborted"), (3, 4, "stop")), of)
    assert of.spans == [[3, 4]]


def test_validation_is_not_recorded(generate):
    assert len(generate(FakeServer((2, 3, "stop")), None).token_ids) == 3


def test_tokens_of_unknown_weights_are_refused(generate):
    with pytest.raises(RuntimeError, match="reports no weight version"):
        generate(FakeServer((None, 3, "stop")), Session())


def test_an_aborted_session_cancels_its_request_and_starts_no_other(generate):
    of, server = Session(), FakeServer((2, 3, "aborted"), (3, 4, "stop"))
    server.on_generate = of.abort
    with pytest.raises(GenerationAborted):
        generate(server, of)
    assert len(server.aborted) == 1 and of.generated_tokens == 3


class EngineDeadError(Exception):
    """As vLLM's is told: by its name."""


def a_dead_tool() -> ActorDiedError:
    error = ActorDiedError()
    error.actor_id = "of an actor that is not the run's"
    return error


class Worker(StalenessAgentLoopWorker):
    """The worker without its tokenizer and servers: every session does as its number says.

    Args:
        sessions: of a group. Session i generates i + 1 tokens, with the weights 3 + i.
        timeout_s: see `generation_timeout_s`.
        masks: keep a group some of whose trajectories failed.
        failing: sessions that fail.
        outputs: trajectories of each session.
    """

    def __init__(
        self, sessions: int, timeout_s: float | None = None, masks: bool = False, failing=(1,), outputs: int = 1
    ) -> None:
        rollout = SimpleNamespace(n=sessions, calculate_log_probs=True, response_length=99)
        trainer = SimpleNamespace(v1=SimpleNamespace(trainer_mode="stale_k"))
        self.config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout), trainer=trainer)
        self._generation_timeout_s, self._masks_failures = timeout_s, masks
        self._running, self._reports, self._has_report = {}, [], asyncio.Event()
        self.processor = None
        self._run_actors = RunActors()
        self._journal = self._fatal = self._sampling = None
        self.reward_loop_worker_handles = None
        self.server = FakeServer()
        self.failing, self.outputs = failing, outputs
        self.order = list(range(sessions))
        self.stored: dict[str, dict] = {}

    async def _run_agent_loop(self, sampling_params, *, trajectory, trace, session_id, uid, behaviour, **_):
        of = current_session.get()
        of.record(3 + session_id, self.outputs * (session_id + 1))
        for _ in range(self.order.index(session_id)):
            await asyncio.sleep(0)
        match behaviour:
            case "fails" if session_id in self.failing:
                raise ValueError(f"no answer {session_id}\nand more lines")
            case "fails and loses its server" if session_id in self.failing:
                raise EngineDeadError("gone") if session_id == 1 else ValueError("no answer")
            case "fails and loses a tool" if session_id in self.failing:
                raise a_dead_tool()
            case "returns nothing" if session_id in self.failing:
                return await self._agent_loop_postprocess([], validate=False)
            case "a reward that raises" if session_id in self.failing:
                self._compute_score = self.raising_reward
            case "will not be cancelled" if session_id in self.failing:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(3600)
                await asyncio.sleep(0.1)
            case "hangs" if session_id in self.failing:
                of.server, of.server_request_id = self.server, "the request"
                await asyncio.sleep(3600)
            case "waits for the abort":
                while not of.is_aborted:
                    await asyncio.sleep(0)
                if session_id not in self.failing:
                    raise GenerationAborted(uid)
        tokens = session_id + 1
        outputs = [output([1] * tokens, [-1.0] * tokens, reward=float(session_id)) for _ in range(self.outputs)]
        return await self._agent_loop_postprocess(outputs, validate=False)

    @staticmethod
    async def raising_reward(outputs, kwargs):
        raise ZeroDivisionError("in the reward function")

    async def _compute_score(self, outputs, kwargs):
        for each in outputs:
            each.extra_fields["reward_extra_info"] = {}

    async def _compute_teacher_logprobs(self, *_, **__):
        pass

    def _compute_multi_modal_inputs(self, *_):
        return {}

    def _compute_position_ids(self, input_ids, *_):
        return torch.arange(input_ids.shape[1]).unsqueeze(0)

    async def _put(self, group, rows):
        assert group.lot == "lot"
        self.stored |= {stored.row.key: stored.packed for stored in rows}

    def run(self, behaviour: str, abort: bool = False, uid: str = "u"):
        async def body():
            prompt = {"uid": uid, "behaviour": behaviour, LOT_FIELD: "lot"}
            work = asyncio.create_task(self._run_prompt(prompt, {}, trajectory={"validate": False}))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if abort:
                await self.abort_groups([uid, "of another worker"])
            (report,) = await self.take_reports()
            await work
            stored = dict(self.stored)
            await asyncio.sleep(0.2 if behaviour == "will not be cancelled" else 0)
            assert self.stored.keys() == stored.keys(), "what is late is not stored"
            assert not self._running and not self._reports and not self._has_report.is_set()
            return report

        return asyncio.run(body())


def test_a_finished_group_is_reported_with_all_its_rows():
    report = Worker(3).run("answers")
    assert report.error is None and [row.key for row in report.rows] == ["u_0_0", "u_1_0", "u_2_0"]
    assert [row.spans for row in report.rows] == [((3, 1),), ((4, 2),), ((5, 3),)]
    assert (report.generated_tokens, report.responses, report.masked_errors) == (6, 3, ())


def test_a_session_that_raises_fails_its_group_and_leaves_its_siblings_rows_to_be_deleted():
    report = Worker(3).run("fails")
    assert report.error == "ValueError: no answer 1" and not report.was_aborted and not report.masked_errors
    assert [row.key for row in report.rows] == ["u_0_0", "u_2_0"]


@pytest.mark.parametrize("masks", [False, True])
def test_a_group_in_which_all_fail_is_one_failure_without_rows(masks):
    report = Worker(3, masks=masks, failing=(0, 1, 2)).run("fails")
    assert report.error == "ValueError: no answer 0" and report.rows == () and not report.was_aborted
    assert report.masked_errors == ()


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("failing", [(0, 1, 2), (0, 1), (1,)])
def test_a_group_whose_server_is_gone_is_lost_whatever_else_failed(masks, failing):
    report = Worker(3, masks=masks, failing=failing).run("fails and loses its server")
    assert report.was_lost and report.error == "EngineDeadError: gone" and not report.masked_errors
    assert not Worker(3, masks=masks, failing=failing).run("fails").was_lost


@pytest.mark.parametrize("masks", [False, True])
def test_a_group_that_loses_a_tool_of_the_users_has_failed(masks):
    report = Worker(3, masks=masks).run("fails and loses a tool")
    assert not report.was_lost
    assert report.error is None if masks else report.error.startswith("ActorDiedError")
    assert [error.split(":")[0] for error in report.masked_errors] == ["ActorDiedError"] * masks


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        ("returns nothing", "ValueError: the agent loop returned no trajectory"),
        ("a reward that raises", "ZeroDivisionError: in the reward function"),
    ],
)
def test_what_cannot_be_scored_fails_its_group(behaviour, error):
    report = Worker(2, failing=(0, 1)).run(behaviour)
    assert report.error == error and report.rows == ()


def test_a_generation_that_refuses_to_be_cancelled_does_not_hold_up_its_group(monkeypatch):
    monkeypatch.setattr("verl_m2po.staleness.rollout.agent_loop.CANCEL_WAIT_S", 0.05)
    report = Worker(2, timeout_s=0.05).run("will not be cancelled")
    assert report.error == "TimeoutError: no answer within generation_timeout_s=0.05"
    assert [row.key for row in report.rows] == ["u_0_0"]


def test_a_generation_that_never_ends_is_cancelled_at_its_server():
    worker = Worker(2, timeout_s=0.05)
    report = worker.run("hangs")
    assert report.error == "TimeoutError: no answer within generation_timeout_s=0.05"
    assert worker.server.aborted == ["the request"]


def test_servers_that_cannot_cancel_a_request_hinder_neither_the_cancellation_nor_other_aborts():
    """As verl's for SGLang and TensorRT-LLM, whose handles raise AttributeError for a method that is not there."""
    worker = Worker(2, timeout_s=0.05)
    worker.server = SimpleNamespace()
    report = worker.run("hangs")
    assert report.error == "TimeoutError: no answer within generation_timeout_s=0.05"
    sessions = [Session(server=worker.server, server_request_id="r") for _ in range(2)]
    worker._running["u"] = SimpleNamespace(sessions=sessions)
    asyncio.run(worker.abort_groups(["u"]))
    assert all(of.is_aborted for of in sessions)


@pytest.mark.parametrize("masks", [False, True])
def test_an_aborted_group_says_so(masks):
    report = Worker(2, masks=masks, failing=()).run("waits for the abort", abort=True)
    assert report.was_aborted and report.error == "GenerationAborted: u" and report.rows == ()


def test_an_aborted_group_is_not_kept_for_the_sake_of_what_had_ended():
    report = Worker(3, masks=True).run("waits for the abort", abort=True)
    assert report.was_aborted and [row.key for row in report.rows] == ["u_1_0"] and not report.masked_errors


def masked_groups():
    """(sessions, some but not all of them)"""
    failing = st.integers(2, 6).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1))
    )
    return given(failing, st.integers(1, 3), st.text("abc", min_size=1), st.randoms(use_true_random=False))


@settings(deadline=None, max_examples=60)
@masked_groups()
def test_a_group_that_is_kept_has_all_its_rows_and_trains_nothing_of_what_failed(group, outputs, uid, order):
    sessions, failing = group
    worker = Worker(sessions, masks=True, failing=failing, outputs=outputs)
    order.shuffle(worker.order)
    report = worker.run("fails", uid=uid)
    assert report.error is None and not report.was_aborted
    assert report.masked_errors == tuple(f"ValueError: no answer {session}" for session in sorted(failing))
    keys = [f"{uid}_{session}_{index}" for session in range(sessions) for index in range(outputs)]
    assert [row.key for row in report.rows] == sorted(worker.stored) == keys
    versions = set()
    for row in report.rows:
        session, fields = int(row.key.split("_")[1]), worker.stored[row.key]
        if session not in failing:
            assert fields["packed_mask"].tolist() == [1] * (session + 1) and row.spans == ((3 + session, session + 1),)
            continue
        sibling = row.min_version - 3
        versions.add(row.min_version)
        assert sibling not in failing, "a copy is of the age of a sibling that succeeded"
        assert fields["packed_mask"].tolist() == [0] * (sibling + 1) and row.generated_tokens == 0
        original = worker.stored[f"{uid}_{sibling}_{row.key[-1]}"]
        for name in ("packed_prompt", "packed_response", "rollout_log_probs"):
            assert fields[name].tolist() == original[name].tolist()
        assert fields["rest"] == original["rest"] | {"session_id": session}
        assert fields["rest"]["last_token_reward"] == sibling
    again = Worker(sessions, masks=True, failing=failing, outputs=outputs)
    assert again.run("fails", uid=uid).rows == report.rows, "the draw depends on the order in which the sessions end"


@pytest.mark.parametrize("behaviour", ["returns nothing", "hangs", "will not be cancelled"])
def test_however_a_session_fails_it_is_masked(behaviour, monkeypatch):
    monkeypatch.setattr("verl_m2po.staleness.rollout.agent_loop.CANCEL_WAIT_S", 0.01)
    worker = Worker(3, timeout_s=0.1, masks=True)
    report = worker.run(behaviour)
    assert report.error is None and len(report.masked_errors) == 1
    assert [row.key for row in report.rows if row.is_masked] == ["u_1_0"]
    assert not worker.stored["u_1_0"]["packed_mask"].any()


def test_the_journal_has_a_group_as_it_is_trained(tmp_path):
    worker = Worker(3, masks=True)
    worker._journal = RowsWriter(tmp_path / "rows", fsync=False)
    report = worker.run("fails")
    (finished,) = map(decode, read_frames(tmp_path / "rows"))
    assert finished.rows == report.rows and finished.newest_version == 5
    assert [packed["packed_mask"].any().item() for packed in finished.packed] == [True, False, True]


class Seeing(Worker):
    """One whose prompt has an image, and in which some sessions cannot be stored."""

    def __init__(self, sessions: int, unstorable: Collection[int]) -> None:
        super().__init__(sessions, masks=True, failing=())
        self.processor, self.unstorable = "a processor", unstorable

    def _compute_multi_modal_inputs(self, *_):
        return {"pixel_values": torch.ones(4, 6), "image_grid_thw": torch.tensor([[1, 2, 2]])}

    def _compute_position_ids(self, input_ids, *_):
        return torch.arange(input_ids.shape[1]).expand(1, 4, -1)

    async def _put(self, group, rows):
        await asyncio.sleep(0)
        if rows[0].packed["packed_mask"].any() and int(rows[0].row.key.split("_")[1]) in self.unstorable:
            raise OSError("no room")
        await super()._put(group, rows)


@pytest.mark.parametrize("unstorable", [(), (0,), (1,), (0, 1)])
def test_an_image_of_the_prompt_lies_with_one_row_that_is_stored(unstorable):
    worker = Seeing(3, unstorable)
    report = worker.run("answers")
    assert report.error is None and len(report.masked_errors) == len(unstorable)
    assert [row.key for row in report.rows] == sorted(worker.stored) == ["u_0_0", "u_1_0", "u_2_0"]
    holding = [key for key, packed in worker.stored.items() if len(packed["media"])]
    assert len(holding) == 1 and int(holding[0].split("_")[1]) not in unstorable
    keys = list(worker.stored)
    rows = media.unpack(
        keys,
        [worker.stored[key]["media"] for key in keys],
        [worker.stored[key]["rest"]["made_of"] for key in keys],
    )
    assert all(torch.equal(row["pixel_values"], torch.ones(4, 6)) for row in rows)


def test_a_group_that_raises_as_a_whole_is_not_kept_for_what_it_had_stored():
    """Which trajectories are missing is unknown then, so no copies could stand in for them."""
    worker = Worker(3, masks=True)
    generate = worker._generate_group

    async def raises(group, *args):
        await generate(group, *args)
        group.failed = {}
        raise OSError("anything but a session's own error")

    worker._generate_group = raises
    report = worker.run("fails")
    assert report.error == "OSError: anything but a session's own error" and report.masked_errors == ()


def test_an_error_that_cannot_be_settled_does_not_hide_the_others():
    worker = Worker(4, masks=True, failing=(1, 2))

    async def settle(error):
        if "answer 1" in str(error):
            raise OSError("while settling")
        return error

    worker._run_actors.settle = settle
    report = worker.run("fails")
    assert report.error is None and report.masked_errors == ("OSError: while settling", "ValueError: no answer 2")


def cyclic() -> list:
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "value", [np.datetime64("2026-01-01"), np.bytes_(b"x"), cyclic()], ids=["date", "bytes", "cycle"]
)
def test_whatever_the_journal_cannot_store_reaches_the_trainer_as_its_error(tmp_path, value):
    worker = Worker(2)
    worker._journal = RowsWriter(tmp_path / "rows", fsync=False)
    scored = worker._compute_score

    async def score(outputs, kwargs):
        await scored(outputs, kwargs)
        outputs[0].extra_fields["mine"] = value

    worker._compute_score = score
    with pytest.raises(JournalError, match=r"cannot store group u: \w+Error.*trainer.v1.stale_k.journal=false"):
        worker.run("answers")


def test_copies_that_cannot_be_stored_fail_their_group():
    worker = Worker(2, masks=True)
    store = worker._put

    async def put(group, rows):
        if rows[0].row.is_masked:
            raise OSError("no space left")
        await store(group, rows)

    worker._put = put
    report = worker.run("fails")
    assert report.error == "OSError: no space left" and report.masked_errors == ()
    assert [row.key for row in report.rows] == ["u_0_0"]


class DyingServer(FakeServer):
    """Raises what an actor raises whose engine is gone, as often as it is asked."""

    async def _generate(self, prompt_ids, sampling_params, **_) -> TokenOutput:
        self.asked.append((len(prompt_ids), sampling_params["max_tokens"]))
        raise EngineDeadError("gone")


class Balancer:
    """Hands out the first server that it has."""

    def __init__(self, *servers) -> None:
        self.servers = {f"server-{i}": server for i, server in enumerate(servers)}
        self.remove_servers = SimpleNamespace(remote=self._remove)

    async def _remove(self, names: list[str]) -> None:
        for name in names:
            self.servers.pop(name, None)


@pytest.fixture
def move(monkeypatch):
    """Runs one generation of the real client against several servers; returns its output."""

    def run(of: Session | None, *servers: FakeServer, heals: bool = True) -> TokenOutput:
        config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(name="vllm")))
        balancer = Balancer(*servers)
        client = SpanRecordingClient(config=config, load_balancer_handle=balancer, heals=heals)

        async def acquire(self, request_id, **_):
            return next(iter(balancer.servers.items()))

        monkeypatch.setattr(LLMServerClient, "_acquire_server", acquire)
        monkeypatch.setattr(LLMServerClient, "_release_server", lambda *_, **__: None)

        async def body():
            current_session.set(of)
            return await client.generate("r", prompt_ids=[1], sampling_params={"max_tokens": 50})

        return contextvars.copy_context().run(asyncio.run, body())

    return run


def test_a_request_moves_from_a_dead_server_and_keeps_what_an_attempt_before_has_given(move):
    of, dying = Session(), DyingServer()
    leaving = FakeServer((2, 3, "aborted"))
    result = move(of, leaving_then(leaving, dying), FakeServer((3, 4, "stop")))
    assert of.spans == [[2, 3], [3, 4]] and len(result.token_ids) == 7
    assert of.deaths == 1 and of.lost_s >= 0


def leaving_then(first: FakeServer, then: FakeServer) -> FakeServer:
    """A server that answers as `first` once, and as `then` from then on."""
    both = FakeServer()

    async def generate(**kwargs) -> TokenOutput:
        return await (first if first._attempts else then)._generate(**kwargs)

    both.generate = SimpleNamespace(remote=generate)
    return both


def test_a_validation_moves_too(move):
    assert len(move(None, DyingServer(), DyingServer(), FakeServer((2, 3, "stop"))).token_ids) == 3


def test_a_request_under_which_servers_die_one_after_the_other_is_given_up(move):
    of, never_asked = Session(), FakeServer((2, 3, "stop"))
    with pytest.raises(ServerDied, match="2 rollout servers died"):
        move(of, DyingServer(), DyingServer(), never_asked)
    assert of.deaths == 2 and not never_asked.asked and not of.spans


def test_where_nothing_heals_the_death_is_the_callers(move):
    of, other = Session(), FakeServer((2, 3, "stop"))
    with pytest.raises(EngineDeadError):
        move(of, DyingServer(), other, heals=False)
    assert of.deaths == 0 and not other.asked
