# pyright: reportAttributeAccessIssue=false
# verl's manager turns its coroutines into plain calls at run time.
"""verl's manager of the agent loop workers: whom a prompt goes to, and who takes the place of a worker that died."""

import asyncio
import copy
import logging
from typing import Any

import ray
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ

from verl_m2po.staleness.config import heals
from verl_m2po.staleness.rollout.agent_loop import StalenessAgentLoopWorker
from verl_m2po.staleness.rollout.reports import answer_timeout_s, wait_for_all
from verl_m2po.staleness.rows.store import LOT_FIELD
from verl_m2po.staleness.watch.liveness import Watch

logger = logging.getLogger(__name__)


class StalenessAgentLoopManager(AgentLoopManagerTQ):
    """Spreads prompts over the workers in turn, so that single replacements do not all go to the first one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(StalenessAgentLoopWorker)
        self._next_worker = 0
        section = self.config.trainer.v1[self.config.trainer.v1.trainer_mode]
        self.answer_timeout_s = answer_timeout_s(section.get("generation_timeout_s"))
        self.heals = heals(self.config)
        self._groups: dict[Any, set[str]] = {}
        self._validates = False
        self._watch: Watch | None = None

    def connect(self, watch: Watch) -> None:
        """Let `watch` look at those that take the place of a dead one, and end no run for one that is replaced."""
        self._watch = watch
        watch.heal_with(self.take_care)

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Start generating `prompts`; returns when the workers have accepted them.

        Raises:
            RuntimeError: a worker is blocked.
        """
        workers = self.agent_loop_workers
        chunks = prompts.chunk(len(workers))
        first, self._next_worker = self._next_worker, (self._next_worker + len(chunks)) % len(workers)
        accepted = []
        for i, chunk in enumerate(chunks):
            worker = workers[(first + i) % len(workers)]
            self._note(worker, chunk)
            accepted.append(worker.generate_sequences.remote(chunk))
        # One that died takes no notice: its groups are lost with the others that it had, see `replace`.
        wait_for_all(accepted, self.answer_timeout_s, may_die=self.can_replace)

    def _note(self, worker: Any, prompts: TensorDict) -> None:
        if LOT_FIELD in prompts:
            self._groups.setdefault(worker, set()).update(prompts["uid"])
        else:
            self._validates = True

    @property
    def can_replace(self) -> bool:
        """Whether a worker that dies is replaced. Not amid a validation, whose prompts nobody remembers."""
        return self.heals and not self._validates

    def end_validation(self) -> None:
        """No prompt of a validation is in flight any more."""
        self._validates = False

    def ended(self, worker: Any, uids: list[str]) -> None:
        """These groups of `worker` have been reported."""
        self._groups.setdefault(worker, set()).difference_update(uids)

    def take_care(self, key: Any, _reason: str) -> bool:
        """The actor `key` is dead. Whether it is a worker that is replaced, as soon as the trainer asks it."""
        return self.can_replace and any(key == worker for worker in [*self._groups, *self.agent_loop_workers])

    def replace(self, index: int) -> tuple[Any, list[str]]:
        """Start another worker in the place of a dead one.

        Returns:
            The new one, and the groups that the old one was generating.
        """
        dead = self.agent_loop_workers[index]
        ray.kill(dead)  # cut off, perhaps, and not dead: what it finishes is not wanted
        spare = copy.copy(self)
        spare.rollout_config = OmegaConf.merge(self.rollout_config, {"agent": {"num_workers": 1}})
        asyncio.run(spare._init_agent_loop_workers())
        (self.agent_loop_workers[index],) = spare.agent_loop_workers
        lost = self._groups.pop(dead, set())
        self._groups[dead] = set()  # still known as one that is replaced
        if self._watch is not None:
            self._watch.add(f"the new agent loop worker {index}", spare.agent_loop_workers)
        logger.warning("agent loop worker %d died: another one generates its %d groups again", index, len(lost))
        return self.agent_loop_workers[index], sorted(lost)
