"""verl's client of the rollout servers, taught to remember which weights generated which tokens.

A server that dies loses a request only the tokens of the present attempt: `_Mover` makes it again elsewhere.

verl keeps the first and the last weight version of a trajectory. A generation that is interrupted by a weight update
and resumed has several, and the loss needs to know where one ends and the next begins. Every attempt passes through
`LLMServerClient.generate`; `_SpanRecorder` sits right in front of it. It also resumes what a weight update interrupted,
at once: the servers park a request until they hold the new weights, so the second that verl's client sleeps is lost.
"""

import asyncio
import contextvars
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ray.exceptions import ActorDiedError
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient

from verl_m2po.patches import verl as verl_patches
from verl_m2po.staleness.watch.liveness import RunActors, ServerDied, is_dead_engine

logger = logging.getLogger(__name__)

MOST_DEATHS = 2
"""Servers that may die under one session before its group is given up: its prompt may be what kills them."""

REFUSED_WAIT_S = 0.1
"""Before the next attempt, if one after the other brought no token: a server that is lent refuses until it serves."""


class GenerationAborted(RuntimeError):
    """The group of this generation is no longer wanted."""


@dataclass
class Session:
    """What one session (one trajectory of a group) has generated so far.

    Args:
        spans: [weight version, generated tokens], in the order of generation, over all turns.
        deaths: rollout servers that died under it, so far.
        lost_s: seconds of generation that were lost with them.
    """

    spans: list[list[int]] = field(default_factory=list)
    is_aborted: bool = False
    server: Any = None
    server_request_id: str | None = None
    deaths: int = 0
    lost_s: float = 0.0

    def record(self, version: int | None, tokens: int) -> None:
        """Note that `version` generated the next `tokens` tokens.

        Raises:
            RuntimeError: the server does not know which weights it holds.
        """
        if version is None:
            raise RuntimeError("the rollout server reports no weight version (global_steps) for its tokens")
        if tokens == 0:
            return
        if self.spans and self.spans[-1][0] == version:
            self.spans[-1][1] += tokens
        else:
            self.spans.append([int(version), tokens])

    @property
    def generated_tokens(self) -> int:
        """Tokens generated so far, by all weight versions."""
        return sum(tokens for _, tokens in self.spans)

    def abort(self) -> None:
        """Stop generating: the request that is running is cancelled at its server, and none follows.

        Only verl's vLLM server can cancel one request. Elsewhere it goes on to its end, and its answer is not used.
        """
        self.is_aborted = True
        if hasattr(self.server, "abort_request") and self.server_request_id is not None:
            self.server.__ray_call__.remote(verl_patches.cancel, [self.server_request_id])


current_session: contextvars.ContextVar[Session | None] = contextvars.ContextVar("current_session", default=None)

_acquired: contextvars.ContextVar[tuple[str, Any] | None] = contextvars.ContextVar("_acquired", default=None)
"""Name and handle of the server that the present attempt was given to."""


class _Mover(LLMServerClient):
    """An attempt whose server dies begins again at another one; of a session, until `MOST_DEATHS` have died under it.

    The dead server leaves the balancer at once; what replaces it, and when, is the trainer's business.
    """

    heals: bool

    async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        session = current_session.get()
        if session is not None and session.is_aborted:  # while no server was left
            raise GenerationAborted(request_id)
        _acquired.set(await super()._acquire_server(request_id, **extra))
        acquired = _acquired.get()
        assert acquired is not None
        return acquired

    async def generate(self, request_id: str, **kwargs: Any) -> Any:
        while True:
            began_at = time.monotonic()
            _acquired.set(None)
            try:
                return await super().generate(request_id, **kwargs)
            except Exception as error:
                acquired = _acquired.get()
                if not self.heals or acquired is None or not await _has_died(acquired[1], error):
                    raise
                await self._load_balancer.remove_servers.remote([acquired[0]])
                logger.warning("request %s moves: rollout server %s is dead", request_id, acquired[0])
                _count_death(current_session.get(), time.monotonic() - began_at, error)


async def _has_died(server: Any, error: BaseException) -> bool:
    """Whether `error` of a call to `server` says that it is gone, or its engine."""
    if is_dead_engine(error):
        return True
    error = await RunActors([server]).settle(error)
    return isinstance(error, ActorDiedError) and error.actor_id == server._actor_id.hex()


def _count_death(session: Session | None, lost_s: float, error: Exception) -> None:
    if session is None:
        return
    session.deaths += 1
    session.lost_s += lost_s
    if session.deaths >= MOST_DEATHS:
        raise ServerDied(f"{session.deaths} rollout servers died under one request, one after the other") from error


class _SpanRecorder(_Mover):
    """Records every attempt in the session that asked for it; without one (validation) it does nothing."""

    async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        server_id, server = await super()._acquire_server(request_id, **extra)
        session = current_session.get()
        if session is not None:
            session.server = server
        return server_id, server

    def _vllm_request_id(self, request_id: str) -> str:
        server_request_id = super()._vllm_request_id(request_id)
        session = current_session.get()
        if session is not None:
            session.server_request_id = server_request_id
        return server_request_id

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> Any:
        session = current_session.get()
        if session is None:
            return await super().generate(request_id, prompt_ids=prompt_ids, sampling_params=sampling_params, **kwargs)
        limit = next((key for key in ("max_tokens", "max_new_tokens") if key in sampling_params), None)
        whole, in_vain = None, 0
        params = dict(sampling_params)
        while True:
            if session.is_aborted:
                raise GenerationAborted(request_id)
            done = whole.token_ids if whole else []
            try:
                output = await super().generate(
                    request_id, prompt_ids=prompt_ids + done, sampling_params=dict(params), **kwargs
                )
            finally:
                session.server_request_id = None
            session.record(output.extra_fields.get("global_steps"), len(output.token_ids))
            whole = output if whole is None else _joined(whole, output)
            if output.stop_reason not in ("aborted", "abort"):
                break
            in_vain = 0 if output.token_ids else in_vain + 1
            if in_vain > 1:
                await asyncio.sleep(REFUSED_WAIT_S)
            if limit is not None:
                params[limit] = sampling_params[limit] - len(whole.token_ids)
                if params[limit] <= 0:
                    break
        if session.is_aborted:
            raise GenerationAborted(request_id)
        return whole


def _joined(first: Any, second: Any) -> Any:
    """The output of a generation and that of its continuation as one."""
    new_tokens = len(second.token_ids)
    if first.routed_experts is not None and second.routed_experts is not None:
        # The continuation routes its prompt again; the routing that generated a token is that of its own attempt.
        new_rows = second.routed_experts[len(second.routed_experts) - new_tokens :]
        second.routed_experts = np.concatenate([first.routed_experts, new_rows])
    second.token_ids = [*first.token_ids, *second.token_ids]
    if first.log_probs is not None or second.log_probs is not None:
        second.log_probs = [*(first.log_probs or []), *(second.log_probs or [])]
    if first.num_preempted is not None:
        second.num_preempted = first.num_preempted + (second.num_preempted or 0)
    second.extra_fields["num_cached_tokens"] = first.extra_fields.get("num_cached_tokens")
    return second


class SpanRecordingClient(FullyAsyncLLMServerClient, _SpanRecorder):
    """`FullyAsyncLLMServerClient` whose every attempt is recorded: its ``super()`` is `_SpanRecorder`.

    Args:
        heals: an attempt whose server dies begins again at another one, and waits where none is left.
        of_verl: further arguments of verl's.
    """

    def __init__(self, *, heals: bool = False, **of_verl: Any) -> None:
        super().__init__(only_hybrid=heals, **of_verl)  # verl's name for: servers come and go
        self.heals = heals
