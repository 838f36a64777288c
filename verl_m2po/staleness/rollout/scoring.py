# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# verl's worker groups hand over untyped data, and tensors that are nested have an `unbind` without a dimension.
"""Log-probs of a few trained tokens, by the trainer's actor and by each rollout server; see watch/served.py."""

import logging
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig
from transfer_queue import KVBatchMeta
from verl.workers.utils.padding import response_from_nested

from verl_m2po.staleness.config import SeparateConfig, load_mode_config
from verl_m2po.staleness.rollout.outputs import first_line
from verl_m2po.staleness.rows.store import elements
from verl_m2po.staleness.watch.liveness import is_dead_engine
from verl_m2po.staleness.watch.served import Scores, require_served

logger = logging.getLogger(__name__)

TOKENS_PER_ROW = 64
"""Of a response, from its beginning, that are compared."""

SERVER_ROWS = 2
"""Rows that each server scores."""

ANSWER_WITHIN_S = 10.0
"""How long the trainer waits for the servers. A request is served in turn, and all rollouts of a long ramp may come
first: the comparison is not worth the time that these take."""


class Probe(NamedTuple):
    """Rows of the batch that is trained, a few for each rank of the trainer.

    Args:
        batch: verl's metadata of the rows.
        sequences: token ids of the first of them, prompt and the beginning of the response.
        prompt_tokens: length of each prompt.
    """

    batch: KVBatchMeta
    sequences: list[list[int]]
    prompt_tokens: list[int]


def take_probe(batch: KVBatchMeta, ranks: int) -> Probe | None:
    """The first rows of `batch`, as many as there are `ranks`; None if they have images, which no row keeps as such."""
    rows = slice(0, ranks)
    keys, tags = batch.keys[rows], batch.tags[rows]
    few = KVBatchMeta(partition_id=batch.partition_id, keys=keys, tags=tags)
    fields = ["prompts", "responses", "multi_modal_inputs"]
    data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=fields)
    if any(elements(data["multi_modal_inputs"])):
        return None
    prompts = [row.tolist() for row in data["prompts"].unbind()[:SERVER_ROWS]]
    responses = [row.tolist()[:TOKENS_PER_ROW] for row in data["responses"].unbind()[:SERVER_ROWS]]
    # Without the last token: a server refuses a prompt that leaves no room for a token.
    sequences = [(prompt + response)[:-1] for prompt, response in zip(prompts, responses, strict=True)]
    return Probe(few, sequences, [len(prompt) for prompt in prompts])


def score(probe: Probe, actor: Any, servers: dict[str, Any]) -> Scores:
    """What both sides, with the weights that they hold now, make of the tokens of `probe`.

    Raises:
        TimeoutError: a server did not answer within `ANSWER_WITHIN_S`.
    """
    asked = {name: [_ask(server, tokens) for tokens in probe.sequences] for name, server in servers.items()}
    trainer = _by_trainer(probe, actor)
    everything = [one for each in asked.values() for one in each]
    if ray.wait(everything, num_returns=len(everything), timeout=ANSWER_WITHIN_S)[1]:
        raise TimeoutError
    answers = {name: _answers(each, probe.prompt_tokens) for name, each in asked.items()}
    return Scores(trainer, {name: torch.cat(each) for name, each in answers.items() if each is not None})


def _answers(asked: list[Any], prompt_tokens: list[int]) -> list[torch.Tensor] | None:
    """Of one server; None if it has died: that is noticed elsewhere."""
    try:
        return [_answer(ray.get(one), n) for one, n in zip(asked, prompt_tokens, strict=True)]
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.ActorDiedError) or is_dead_engine(error):
            return None
        raise


def _ask(server: Any, tokens: list[int]) -> Any:
    params = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
    return server.generate.remote(prompt_ids=tokens, sampling_params=params, request_id=uuid.uuid4().hex)


def _answer(output: Any, prompt_tokens: int) -> torch.Tensor:
    """Log-probs of the response; those of a token stand one place before it, and the last is a filler of verl's."""
    found = output.extra_fields["prompt_logprobs"][prompt_tokens - 1 : -1]
    return torch.tensor([log_prob for (log_prob,) in found], dtype=torch.float32)


def _by_trainer(probe: Probe, actor: Any) -> torch.Tensor:
    batch = probe.batch
    # One row at a time, as any division of the batch sizes allows.
    batch.extra_info = {
        "calculate_entropy": False,
        "compute_loss": False,
        "temperature": 1.0,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": 1,
    }
    actor.compute_log_prob(batch)
    data = tq.kv_batch_get(
        keys=batch.keys, partition_id=batch.partition_id, select_fields=["log_probs", "response_mask"]
    )
    rows = response_from_nested(data["log_probs"], data["response_mask"]).unbind()
    lengths = [len(tokens) - prompt for tokens, prompt in zip(probe.sequences, probe.prompt_tokens, strict=True)]
    return torch.cat([row[:length].float() for row, length in zip(rows, lengths, strict=False)])


class ServedCheck:
    """Compares both sides once: before the first update and after the push that follows it.

    Args:
        key: full name of the setting of `tolerance_nats`.
        tolerance_nats: see `watch.served.require_served`; None never compares.
        actor: verl's worker group of the actor.
        servers: returns the handles of the present rollout servers by name.
    """

    def __init__(
        self, key: str, tolerance_nats: float | None, actor: Any, servers: Callable[[], dict[str, Any]]
    ) -> None:
        self._key, self._tolerance_nats = key, tolerance_nats
        self._actor, self._servers = actor, servers
        self._before: tuple[Probe, Scores] | None = None
        self._is_due = tolerance_nats is not None
        self._metrics: dict[str, float] = {}

    @classmethod
    def of(cls, config: DictConfig, actor: Any, manager: Any) -> "ServedCheck":
        """The check of a run; one whose rollout is not vLLM's is not asked.

        Args:
            manager: verl's manager of the rollout servers.
        """
        mode = config.trainer.v1.trainer_mode
        settings = load_mode_config(config, mode)
        assert isinstance(settings, SeparateConfig)
        tolerance_nats = settings.served_within_nats if config.actor_rollout_ref.rollout.name == "vllm" else None

        def servers() -> dict[str, Any]:
            return {replica.server_address: replica.server_handle for replica in manager.get_replicas()}

        return cls(f"trainer.v1.{mode}.served_within_nats", tolerance_nats, actor, servers)

    def before_update(self, batch: KVBatchMeta) -> None:
        """Score some rows of `batch`, whose update follows, with the weights of before."""
        if self._is_due and self._before is None:
            probe = take_probe(batch, self._actor.world_size)
            if probe is None:
                self._is_due = False
                self._say_nothing_was_compared("the rows have images")
                return
            before = self._score(probe)
            self._before = None if before is None else (probe, before)

    def _score(self, probe: Probe) -> Scores | None:
        """What both sides say; None where no server lives, or where they are too busy: then they are asked no more."""
        servers = self._servers()
        if not servers:
            return None
        try:
            return score(probe, self._actor, servers)
        except TimeoutError:
            self._is_due = False
            self._say_nothing_was_compared(
                f"the servers did not score within {ANSWER_WITHIN_S:g} s, all that they generate comes first"
            )
            return None
        except ray.exceptions.RayTaskError as error:
            raise RuntimeError(
                f"{self._key}={self._tolerance_nats:g}: the tokens cannot be scored ({first_line(error.cause)}). Set "
                "it to null to do without the comparison"
            ) from error

    def _say_nothing_was_compared(self, why: str) -> None:
        setting = (self._key, self._tolerance_nats)
        logger.warning("what the rollout serves is not compared with what is trained (%s=%g): %s", *setting, why)

    def after_push(self) -> None:
        """Score them again, and compare.

        Raises:
            RolloutServesOtherWeights: see `watch.served.require_served`.
        """
        if self._before is None or self._tolerance_nats is None:
            return
        probe, before = self._before
        after = self._score(probe)
        self._before, self._is_due = None, self._is_due and after is None
        if after is not None:
            largest = require_served(before, after, self._tolerance_nats, self._key)
            self._metrics = {"staleness/served_difference_nats": largest}

    def take_metrics(self) -> dict[str, float]:
        """The difference that was found, once."""
        taken, self._metrics = self._metrics, {}
        return taken
