"""Optimizer updates on one process: verl's loss and optimizer, the actor worker's statistics, a plain forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor
from transformers import Qwen2ForCausalLM
from verl.utils import tensordict_utils as tu
from verl.utils.metric import reduce_metrics
from verl.utils.py_functional import append_to_dict
from verl.utils.torch_functional import (
    entropy_from_logits,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
)
from verl.workers.config import build_optimizer
from verl.workers.utils.losses import ppo_loss

from verl_m2po.actor.averaged import AveragedWeights, decay_of
from verl_m2po.actor.observed import Observed
from verl_m2po.ground.fields import AGE_FIELD
from verl_m2po.losses.kernel import diagnostics
from verl_m2po.losses.kernel.mini_batch import MiniBatch, training
from verl_m2po.losses.kernel.registry import LOSSES
from verl_m2po.losses.step_scale import scaled_by_effective_share
from verl_m2po.one_process.rollouts import prompt_cache
from verl_m2po.one_process.setup import Setup

FIELDS = (
    *("prompts", "responses", "attention_mask", "response_mask"),
    *("rollout_log_probs", "old_log_probs", "advantages", AGE_FIELD),
)
# Token or response weights proximal / behaviour, where the config asks for them
WEIGHTS = "rollout_is_weights"


class Learner:
    """What verl's actor worker does with a batch, for a model that fits into one process.

    A mini-batch is one micro-batch, so that a loss that decides over the whole mini-batch sees all of it. Other losses
    get micro-batches of `ppo_micro_batch_size_per_gpu` rows where the config asks for a number of rows
    (`use_dynamic_bsz=false`).

    Args:
        model: The policy, trained in place.
        setup: Loss, optimizer and sizes.
    """

    def __init__(self, model: Qwen2ForCausalLM, setup: Setup) -> None:
        self._model = model
        self._actor = setup.actor
        self._temperature = setup.config.actor_rollout_ref.rollout.temperature
        self._responses = setup.responses
        self._rows = setup.actor.ppo_mini_batch_size * setup.responses
        loss = LOSSES.get(setup.actor.policy_loss.loss_mode)
        decides = loss is not None and loss.decides_over_mini_batch(setup.actor)
        is_one = setup.actor.use_dynamic_bsz or decides
        self._micro_rows = self._rows if is_one else setup.actor.ppo_micro_batch_size_per_gpu
        self._mismatch_floor: float | None = None
        self._step_scale = setup.actor.policy_loss.step_scale
        decay = decay_of(setup.actor)
        self._average = None if decay is None else AveragedWeights(model.named_parameters, decay)
        self._optimizer = build_optimizer(model.parameters(), setup.actor.optim)
        self._schedule = _schedule(self._optimizer, setup.actor.optim)

    def train_step(self, batch: TensorDict) -> dict[str, list[Any]]:
        """All optimizer updates of one trainer step; each metric of the updates as a list, by verl's names.

        Args:
            batch: The fields of `FIELDS`, with or without `WEIGHTS`, [rows, ...]; the responses to a prompt follow
                each other.
        """
        names = (*FIELDS, WEIGHTS) if WEIGHTS in batch.keys() else FIELDS  # noqa: SIM118 (a TensorDict)
        metrics: dict[str, list[Any]] = {}
        update = 0
        for _ in range(self._actor.ppo_epochs):
            for mini_batch in batch.select(*names).split(self._rows):
                append_to_dict(metrics, self.update(mini_batch, update))
                update += 1
        self._schedule.step()
        metrics["actor/lr"] = [self._schedule.get_last_lr()[0]]
        return metrics

    def update(self, data: TensorDict, updates_before: int = 0) -> dict[str, float]:
        """One optimizer update on a whole mini-batch.

        Args:
            data: As for `train_step`.
            updates_before: Updates of this trainer step before it, by which the rows are older.
        """
        whole = {"dp_size": 1, "batch_num_tokens": int(data["response_mask"].sum()), "global_batch_size": len(data)}
        mini_batch = MiniBatch(decide_in_loss=True, weighs_responses=self._step_scale.is_on)
        loss_fn = Observed(
            partial(ppo_loss, config=self._actor),
            mini_batch,
            bool(self._actor.policy_loss.get("diagnostics", False)),
            lambda rows: _is_age_zero(rows, updates_before),
        )
        if self._average is not None:
            with self._average.in_place():
                mini_batch.averaged.extend(self.log_probs(data).split(self._micro_rows))
        self._optimizer.zero_grad()
        metrics: dict[str, Any] = {}
        with training(mini_batch):
            for micro_batch in data.split(self._micro_rows):
                tu.assign_non_tensor(micro_batch, **whole)
                loss, found = loss_fn(model_output=self._outputs(micro_batch), data=micro_batch)
                loss.backward()
                append_to_dict(metrics, found)
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._actor.optim.clip_grad)
        with self._scaled_step(mini_batch):
            if torch.isfinite(norm):
                self._optimizer.step()
        if self._average is not None:
            self._average.update()
        if mini_batch.sums:
            statistics = diagnostics.mini_batch_metrics(diagnostics.added_up(mini_batch.sums), self._mismatch_floor)
            self._mismatch_floor = statistics.get("mismatch_floor")
            mini_batch.metrics |= statistics
        named = {f"{diagnostics.PREFIX}{name}": value for name, value in mini_batch.metrics.items()}
        return reduce_metrics(metrics) | named | {"actor/grad_norm": norm.item()}

    def multiply_learning_rate(self, factor: float) -> None:
        """Of all updates that follow, in proportion to what the schedule says; to disturb a run."""
        self._schedule.base_lrs = [rate * factor for rate in self._schedule.base_lrs]
        for group in self._optimizer.param_groups:
            group["lr"] *= factor

    @contextmanager
    def _scaled_step(self, mini_batch: MiniBatch) -> Iterator[None]:
        settings = self._step_scale
        if not settings.is_on:
            yield
            return
        log_weight = torch.cat(mini_batch.log_weights)
        with scaled_by_effective_share(self._optimizer, log_weight, settings.base_share, settings.power) as metrics:
            mini_batch.metrics |= metrics
            yield

    @torch.no_grad()
    def log_probs(self, batch: TensorDict) -> Tensor:
        """Log-probs of the responses with the present weights, [rows, response]."""
        parts = (self._responses_log_probs(rows)[0] for rows in batch.split(self._rows))
        return torch.cat(list(parts))

    def _responses_log_probs(self, data: TensorDict) -> tuple[Tensor, Tensor]:
        """Log-probs of the response tokens, [rows, response], and the logits that they come from."""
        cache = prompt_cache(self._model, data["prompts"][:: self._responses], self._responses)
        # The last token of a response predicts nothing.
        seen = torch.cat((data["prompts"][:, -1:], data["responses"][:, :-1]), dim=1)
        logits = self._model(input_ids=seen, past_key_values=cache).logits / self._temperature
        return logits.log_softmax(-1).gather(-1, data["responses"][..., None]).squeeze(-1), logits

    def _outputs(self, data: TensorDict) -> dict[str, Tensor]:
        """Log-prob of the next token at every position, as verl's engines give them, [rows x tokens]."""
        prompt = data["prompts"].shape[1]
        log_probs, logits = self._responses_log_probs(data)

        def everywhere(of_response: Tensor) -> Tensor:
            return F.pad(of_response, (prompt - 1, 1)).flatten()

        outputs = {"log_probs": everywhere(log_probs)}
        if self._actor.calculate_entropy or self._actor.entropy_coeff:
            outputs["entropy"] = everywhere(entropy_from_logits(logits))
        return outputs


def _is_age_zero(data: TensorDict, updates_before: int) -> Tensor | None:
    """bool [rows]: rows that the present weights generated; None, which saves a pass over the tokens, for no row."""
    is_age_zero = data[AGE_FIELD] + updates_before == 0
    return is_age_zero if is_age_zero.any() else None


def _schedule(optimizer: torch.optim.Optimizer, optim: Any) -> torch.optim.lr_scheduler.LRScheduler:
    """verl's learning rate schedules, in trainer steps."""
    warmup = optim.lr_warmup_steps
    if warmup is None or warmup <= 0:
        warmup = int(optim.lr_warmup_steps_ratio * optim.total_training_steps)
    if optim.lr_scheduler_type == "constant":
        return get_constant_schedule_with_warmup(optimizer=optimizer, num_warmup_steps=warmup)
    return get_cosine_schedule_with_warmup(
        optimizer=optimizer,
        num_warmup_steps=warmup,
        num_training_steps=optim.total_training_steps,
        min_lr_ratio=optim.min_lr_ratio,
        num_cycles=optim.num_cycles,
        zero_indexed_step=optim.zero_indexed_step,
    )
