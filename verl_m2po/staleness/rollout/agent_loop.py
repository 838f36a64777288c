# pyright: reportAttributeAccessIssue=false
# Ray's actor classes carry their metadata in attributes that its types do not name.
"""verl's agent loop workers, which report each finished group to the trainer at once.

verl's workers write rows and statuses into one TransferQueue partition, and the trainer lists that partition until
enough is there. Here a training group's rows go to the partition of its lot, packed, and a short report goes to the
trainer, which waits for it without polling. Validation is verl's own, untouched.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transfer_queue as tq
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ, apply_greedy_sampling_params
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_m2po.staleness.dynamic_sampling import DynamicSampling
from verl_m2po.staleness.restart.frames import FinishedGroup, JournalError, RowsWriter
from verl_m2po.staleness.rollout.client import GenerationAborted, Session, current_session
from verl_m2po.staleness.rollout.informative import UnknownMetric, shared_metric
from verl_m2po.staleness.rollout.masking import StoredRow, row_key, stand_in
from verl_m2po.staleness.rollout.outputs import check_output, first_line, spans_of
from verl_m2po.staleness.rows import codec
from verl_m2po.staleness.rows.media import Pool
from verl_m2po.staleness.rows.store import LOT_FIELD
from verl_m2po.staleness.rule.records import GroupReport, Row
from verl_m2po.staleness.watch.liveness import RunActors, ServerDied

logger = logging.getLogger(__name__)

REPORT_WAIT_S = 5.0
"""How long a worker holds the trainer's question before it answers that nothing has finished."""


CANCEL_WAIT_S = 10.0
"""How long a generation that took too long may resist its cancellation. What one that goes on returns is not stored."""


@dataclass
class _RunningGroup:
    uid: str
    lot: str
    sessions: list[Session] = field(default_factory=list)
    stored: dict[int, list[StoredRow]] = field(default_factory=dict)
    failed: dict[int, BaseException] = field(default_factory=dict)
    began_at: float = field(default_factory=time.time)
    _pool: Pool = field(default_factory=Pool)
    _is_storing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @asynccontextmanager
    async def sharing(self, has_images: bool) -> AsyncIterator[Pool | None]:
        """What its rows have in common, for one session at a time to add to; None where the model takes no images.

        What a session adds counts once that session is stored.
        """
        if not has_images:
            yield None
            return
        async with self._is_storing:
            pool = self._pool.copy()
            yield pool
            self._pool = pool

    def stored_rows(self) -> list[StoredRow]:
        """What there is of all sessions, in the order of the keys."""
        return sorted((row for rows in self.stored.values() for row in rows), key=lambda stored: stored.row.key)

    def root_error(self, run_actors: RunActors) -> BaseException | None:
        """The error of a session that says most; None if none failed.

        An abort is the cause of nothing else, so any other error says more; a death is the cause of any, and that of a
        server the one that the run can live with.
        """

        def says_little(error: BaseException) -> tuple[bool, bool, bool]:
            return not run_actors.is_death(error), isinstance(error, ServerDied), isinstance(error, GenerationAborted)

        return min(self.failed.values(), key=says_little, default=None)

    def can_be_masked(self, run_actors: RunActors) -> bool:
        """Whether some trajectory is there and the others failed.

        What was aborted is no longer wanted, and what is lost with a process ends the run: neither is a failure. Where
        the group as a whole raised, nobody knows which trajectories are missing.
        """
        return bool(self.stored and self.failed) and not any(
            isinstance(error, GenerationAborted) or run_actors.is_death(error) for error in self.failed.values()
        )

    def report(
        self, error: BaseException | None, run_actors: RunActors, shared_metric: float | None = None
    ) -> GroupReport:
        """How it ended; `error` is what it ended with, `shared_metric` why it has no advantage."""
        return GroupReport(
            uid=self.uid,
            rows=tuple(stored.row for stored in self.stored_rows()),
            error=None if error is None else first_line(error),
            was_aborted=isinstance(error, GenerationAborted),
            was_lost=error is not None and run_actors.is_death(error),
            deaths=max(each.deaths for each in self.sessions) if isinstance(error, ServerDied) else 0,
            moves=sum(session.deaths for session in self.sessions),
            lost_s=sum(session.lost_s for session in self.sessions),
            generated_tokens=sum(session.generated_tokens for session in self.sessions),
            responses=max(1, len(self.sessions)),
            began_at=self.began_at,
            finished_at=time.time(),
            masked_errors=() if error is not None else tuple(map(first_line, self.failed.values())),
            shared_metric=shared_metric,
        )


class StalenessAgentLoopWorker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):
    """Generates groups into their lots, and answers the trainer's question which have ended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        section = self.config.trainer.v1[self.config.trainer.v1.trainer_mode]
        self._generation_timeout_s: float | None = section.get("generation_timeout_s")
        self._sampling = DynamicSampling.of(self.config)
        self._masks_failures: bool = section.get("on_failed_trajectory") == "mask"
        self._running: dict[str, _RunningGroup] = {}
        self._reports: list[GroupReport] = []
        self._has_report = asyncio.Event()
        self._run_actors = RunActors()
        self._journal: RowsWriter | None = None
        self._fatal: Exception | None = None

    async def depend_on(self, actors: list[Any]) -> None:
        """A group that fails because one of `actors` died is lost with the run from now on; see `RunActors`."""
        self._run_actors = RunActors(actors)

    async def journal_to(self, path: str, fsync: bool) -> None:
        """Append finished groups to the file `path` from now on."""
        self._journal = RowsWriter(path, fsync)

    async def take_reports(self) -> list[GroupReport]:
        """Groups that ended since the last call; waits up to `REPORT_WAIT_S` for the first.

        Raises:
            JournalError: one of them could not be written to the journal.
            UnknownMetric: one of them cannot be filtered as configured.
        """
        try:
            await asyncio.wait_for(self._has_report.wait(), REPORT_WAIT_S)
        except asyncio.TimeoutError:
            return []
        if self._fatal is not None:
            raise self._fatal
        reports, self._reports = self._reports, []
        self._has_report.clear()
        return reports

    async def abort_groups(self, uids: list[str]) -> None:
        """Stop generating these groups. Each still reports its end; unknown ones are another worker's."""
        for group in filter(None, map(self._running.get, uids)):
            for session in group.sessions:
                session.abort()

    async def _run_prompt(self, prompt: dict, sampling_params: dict, trajectory: dict, trace: bool = False) -> None:
        if LOT_FIELD not in prompt:
            return await super()._run_prompt(prompt, sampling_params, trajectory=trajectory, trace=trace)
        group = _RunningGroup(uid=prompt["uid"], lot=prompt.pop(LOT_FIELD))
        self._running[group.uid] = group
        error = await self._first_error(group, self._generate_group(group, prompt, sampling_params, trajectory, trace))
        if error is not None and self._masks_failures and group.can_be_masked(self._run_actors):
            error = await self._mask_failed(group)
        del self._running[group.uid]
        shared = self._shared_metric(group) if error is None else None
        if error is None and shared is None and self._journal is not None:
            # Before the report: what is trained is in the journal. An error goes to the trainer with the next reports.
            failed = await _journal_error(self._journal, group, self.config.trainer.v1.trainer_mode)
            self._fatal = self._fatal if failed is None else failed
        self._reports.append(group.report(error, self._run_actors, shared))
        self._has_report.set()

    def _shared_metric(self, group: _RunningGroup) -> float | None:
        """What makes a group one without advantage, if it is; an error goes to the trainer with the next reports."""
        try:
            return self._sampling and shared_metric(group.stored_rows(), self._sampling.metric)
        except UnknownMetric as error:
            self._fatal = error
            return None

    async def _first_error(self, group: _RunningGroup, work: Awaitable[None]) -> BaseException | None:
        """The error that a group ends with, if any. It travels to the trainer in the report, not as an exception."""
        try:
            await work
        except Exception as error:
            logger.exception("a prompt group could not be started")
            return error
        for error in group.failed.values():
            if not isinstance(error, GenerationAborted):
                logger.error("a session failed", exc_info=(type(error), error, error.__traceback__))
        return group.root_error(self._run_actors)

    async def _generate_group(
        self, group: _RunningGroup, prompt: dict, sampling_params: dict, trajectory: dict, trace: bool
    ) -> None:
        n = prompt.pop("__rollout_n__", self.config.actor_rollout_ref.rollout.n)
        sampling_params = dict(sampling_params)
        if not prompt.pop("__do_sample__", True):
            apply_greedy_sampling_params(sampling_params)
        group.sessions.extend(Session() for _ in range(n))
        sessions = [
            self._run_session(group, session_id, sampling_params, trajectory, trace, prompt) for session_id in range(n)
        ]
        results = await asyncio.gather(*map(asyncio.create_task, sessions), return_exceptions=True)
        errors = {i: result for i, result in enumerate(results) if isinstance(result, BaseException)}
        # An error of settling one stands for it: the others are still known.
        settled = await asyncio.gather(*map(self._run_actors.settle, errors.values()), return_exceptions=True)
        group.failed = dict(zip(errors, settled, strict=True))

    async def _mask_failed(self, group: _RunningGroup) -> Exception | None:
        """Let masked copies of siblings stand in for what failed; the error of doing so, if any."""
        copies = {session_id: stand_in(group.uid, session_id, group.stored) for session_id in group.failed}
        try:
            for rows in copies.values():
                await self._put(group, rows)
        except Exception as error:
            logger.exception("the failed trajectories of a prompt group could not be masked")
            return error
        group.stored |= copies
        return None

    async def _run_session(
        self, group: _RunningGroup, session_id: int, sampling_params: dict, trajectory: dict, trace: bool, prompt: dict
    ) -> None:
        session = group.sessions[session_id]
        current_session.set(session)
        generation = asyncio.create_task(
            self._run_agent_loop(sampling_params, trajectory=trajectory, trace=trace, session_id=session_id, **prompt)
        )
        await asyncio.wait({generation}, timeout=self._generation_timeout_s)
        if not generation.done():
            session.abort()  # before the cancellation: it needs the request that is still running
            generation.cancel()
            await asyncio.wait({generation}, timeout=CANCEL_WAIT_S)
            raise TimeoutError(f"no answer within generation_timeout_s={self._generation_timeout_s}")
        # Here and not in the generation, so that nothing is stored of one that has failed.
        await self._store(group, session_id, generation.result())

    async def _agent_loop_postprocess(
        self, output: AgentLoopOutput | list[AgentLoopOutput], validate: bool, **kwargs: Any
    ) -> list[AgentLoopOutput] | None:
        """As verl's for validation; otherwise score and check the trajectories of a session, and return them."""
        if current_session.get() is None:
            return await super()._agent_loop_postprocess(output, validate, **kwargs)
        outputs = output if isinstance(output, list) else [output]
        if not outputs:
            raise ValueError("the agent loop returned no trajectory")
        await self._compute_score(outputs, kwargs=kwargs)
        last = outputs[-1]
        await self._compute_teacher_logprobs(
            last, prompt_ids=last.prompt_ids, response_ids=last.response_ids, validate=validate, sample_kwargs=kwargs
        )
        for earlier in outputs[:-1] if last.reward_score is not None else []:
            earlier.reward_score = last.reward_score
            earlier.extra_fields["reward_extra_info"] = last.extra_fields["reward_extra_info"]
        rollout = self.config.actor_rollout_ref.rollout
        for each in outputs:
            check_output(
                each,
                needs_log_probs=rollout.calculate_log_probs,
                max_response_tokens=rollout.response_length,
                needs_reward=self.reward_loop_worker_handles is not None,
            )
        return outputs

    async def _store(self, group: _RunningGroup, session_id: int, outputs: list[AgentLoopOutput]) -> None:
        rows = []
        async with group.sharing(self.processor is not None) as pool:
            for index, output in enumerate(outputs):
                spans = spans_of(group.sessions[session_id], output)
                key = row_key(group.uid, session_id, index)
                row = Row(key, len(output.prompt_ids), len(output.response_ids), spans)
                # The client resumes below verl's, which so sees the last version only.
                output.extra_fields |= {"min_global_steps": row.min_version, "max_global_steps": row.max_version}
                rows.append(StoredRow(row, codec.pack(self._fields(output, session_id), key, pool)))
            await self._put(group, rows)
        group.stored[session_id] = rows

    @staticmethod
    async def _put(group: _RunningGroup, rows: Sequence[StoredRow]) -> None:
        keys = [stored.row.key for stored in rows]
        fields = list_of_dict_to_tensordict([stored.packed for stored in rows])
        await tq.async_kv_batch_put(keys=keys, fields=fields, partition_id=group.lot)

    def _fields(self, output: AgentLoopOutput, session_id: int) -> dict[str, Any]:
        """verl's fields of one trajectory, without those of the data set, which are stored with the prompt."""
        fields = output.as_dict()
        fields.pop("multi_modal_data", None)
        input_ids = torch.cat([fields["prompts"], fields["responses"]])
        multi_modal_inputs = self._compute_multi_modal_inputs(output, input_ids)
        attention_mask = torch.ones_like(input_ids)
        fields["position_ids"] = self._compute_position_ids(
            input_ids.unsqueeze(0), attention_mask.unsqueeze(0), multi_modal_inputs
        ).squeeze(0)
        fields["multi_modal_inputs"] = multi_modal_inputs
        fields["session_id"] = session_id
        if fields.get("mm_processor_output") is not None:
            fields["mm_processor_output"] = None  # of a teacher, who has answered by now
        return fields


async def _journal_error(journal: RowsWriter, group: _RunningGroup, mode: str) -> JournalError | None:
    """Why `group` could not be written to `journal`; None if it was."""
    try:
        rows, packed = zip(*group.stored_rows(), strict=True)
        await asyncio.to_thread(journal.append, FinishedGroup(group.uid, rows, packed))
    except JournalError as error:
        return error
    except Exception as error:
        # An agent loop may return anything. Without its report the trainer would wait for this group for ever.
        logger.exception("a prompt group could not be written to the journal")
        return JournalError(
            f"the journal cannot store group {group.uid}: {first_line(error)}. Let the agent loop and the reward "
            f"function return plain values, or set trainer.v1.{mode}.journal=false"
        )
    return None
