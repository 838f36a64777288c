"""What the rollout side reports: which weights generated which tokens, and what is refused."""

import asyncio
import contextlib
import contextvars
import math
from types import SimpleNamespace

import pytest
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from verl_m2po.staleness.agent_loop import StalenessAgentLoopWorker, check_output, spans_of
from verl_m2po.staleness.client import GenerationAborted, Session, SpanRecordingClient, current_session
from verl_m2po.staleness.records import Row
from verl_m2po.staleness.store import LOT_FIELD


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
        self.abort_request = SimpleNamespace(remote=lambda request_id, **_: self.aborted.append(request_id))
        self.on_generate = lambda: None
        self.asked: list[tuple[int, int]] = []

    async def _generate(self, prompt_ids, sampling_params, **_) -> TokenOutput:
        self.asked.append((len(prompt_ids), sampling_params["max_tokens"]))
        self.on_generate()
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


class Worker(StalenessAgentLoopWorker):
    """The worker without its tokenizer and servers: every session does as its number says."""

    def __init__(self, sessions: int, timeout_s: float | None = None) -> None:
        self.config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(n=sessions)))
        self._generation_timeout_s = timeout_s
        self._running, self._reports, self._has_report = {}, [], asyncio.Event()
        self._journal = self._journal_error = None
        self.server = FakeServer()

    async def _run_agent_loop(self, sampling_params, *, trajectory, trace, session_id, uid, behaviour, **_):
        of = current_session.get()
        of.record(3, session_id + 1)
        match behaviour:
            case "fails" if session_id == 1:
                raise ValueError("no answer\nand more lines")
            case "fails and loses its server":
                raise EngineDeadError("gone") if session_id == 1 else ValueError("no answer")
            case "all fail":
                raise ValueError(f"no answer {session_id}")
            case "returns nothing":
                return await self._agent_loop_postprocess([], validate=False)
            case "a reward that raises":
                self._compute_score = self.raising_reward
                return await self._agent_loop_postprocess(output([1], [-1.0]), validate=False)
            case "will not be cancelled" if session_id == 1:
                while True:
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(0.3)
                        return None
            case "hangs" if session_id == 1:
                of.server, of.server_request_id = self.server, "the request"
                await asyncio.sleep(3600)
            case "waits for the abort":
                while not of.is_aborted:
                    await asyncio.sleep(0)
                raise GenerationAborted(uid)
        self._running[uid].rows.append(Row(f"{uid}_{session_id}_0", 1, session_id + 1, ((3, session_id + 1),)))

    @staticmethod
    async def raising_reward(outputs, kwargs):
        raise ZeroDivisionError("in the reward function")

    def run(self, behaviour: str, abort: bool = False):
        async def body():
            prompt = {"uid": "u", "behaviour": behaviour, LOT_FIELD: "lot"}
            work = asyncio.create_task(self._run_prompt(prompt, {}, trajectory={"validate": False}))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if abort:
                await self.abort_groups(["u", "of another worker"])
            (report,) = await self.take_reports()
            await work
            assert not self._running and not self._reports and not self._has_report.is_set()
            return report

        return asyncio.run(body())


def test_a_finished_group_is_reported_with_all_its_rows():
    report = Worker(3).run("answers")
    assert report.error is None and [row.key for row in report.rows] == ["u_0_0", "u_1_0", "u_2_0"]
    assert (report.generated_tokens, report.responses) == (6, 3)


def test_a_session_that_raises_fails_its_group_and_leaves_its_siblings_rows_to_be_deleted():
    report = Worker(3).run("fails")
    assert report.error == "ValueError: no answer" and not report.was_aborted
    assert [row.key for row in report.rows] == ["u_0_0", "u_2_0"]


def test_a_group_in_which_all_fail_is_one_failure_without_rows():
    report = Worker(3).run("all fail")
    assert report.error == "ValueError: no answer 0" and report.rows == () and not report.was_aborted


def test_a_group_whose_server_is_gone_is_lost_whatever_else_failed():
    report = Worker(3).run("fails and loses its server")
    assert report.was_lost and report.error == "EngineDeadError: gone"
    assert not Worker(3).run("all fail").was_lost


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        ("returns nothing", "ValueError: the agent loop returned no trajectory"),
        ("a reward that raises", "ZeroDivisionError: in the reward function"),
    ],
)
def test_what_cannot_be_scored_fails_its_group(behaviour, error):
    report = Worker(2).run(behaviour)
    assert report.error == error and report.rows == ()


def test_a_generation_that_refuses_to_be_cancelled_does_not_hold_up_its_group(monkeypatch):
    monkeypatch.setattr("verl_m2po.staleness.agent_loop.CANCEL_WAIT_S", 0.05)
    report = Worker(2, timeout_s=0.05).run("will not be cancelled")
    assert report.error == "TimeoutError: no answer within generation_timeout_s=0.05"
    assert [row.key for row in report.rows] == ["u_0_0"]


def test_a_generation_that_never_ends_is_cancelled_at_its_server():
    worker = Worker(2, timeout_s=0.05)
    report = worker.run("hangs")
    assert report.error == "TimeoutError: no answer within generation_timeout_s=0.05"
    assert worker.server.aborted == ["the request"]


def test_an_aborted_group_says_so():
    report = Worker(2).run("waits for the abort", abort=True)
    assert report.was_aborted and report.error == "GenerationAborted: u" and report.rows == ()
