"""The actor worker that makes the trust region exact over a whole optimizer mini-batch.

verl calls a loss once for each micro-batch on each rank; the paper decides over all training tokens at once. So before
verl trains on a mini-batch, this worker looks at all of it with the current policy, without gradient, and with all
data-parallel ranks together. Importing this module puts it into verl's seam for actor workers.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from verl_m2po.actor.averaged import Averaging
from verl_m2po.actor.observed import Observed, Seen, age_zero_sums, response_tokens
from verl_m2po.actor.proof import ProvenTrainingWorker
from verl_m2po.advantages.finite import require_finite
from verl_m2po.ground.fields import AGE_FIELD
from verl_m2po.losses.kernel import diagnostics
from verl_m2po.losses.kernel.evaluate import deciding_tokens
from verl_m2po.losses.kernel.mini_batch import MiniBatch, training
from verl_m2po.losses.kernel.record import Loss
from verl_m2po.losses.kernel.registry import LOSSES
from verl_m2po.losses.kernel.settings import KEY, settings_of
from verl_m2po.losses.step_scale import StepScaleConfig, scaled_by_effective_share
from verl_m2po.patches.verl import around_optimizer_step

WORKER_STATE_FILE = "m2po_worker.json"
"""Beside verl's shards in a checkpoint: what this worker knows besides them. The same on every rank."""


class M2POTrainingWorker(ProvenTrainingWorker):
    """verl's training worker, with one decision for each optimizer mini-batch where the loss asks for it.

    With any loss that is not of this package, and without `policy_loss.diagnostics`, it is verl's own worker.
    """

    _mismatch_floor: float | None = None
    _updates_in_call: int = 0

    @cached_property
    def _averaging(self) -> Averaging:
        return Averaging()

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        """As verl's; ages of rows count from its start, and advantages must be finite where a loss is observed."""
        self._updates_in_call = 0
        config = actor_config(self.loss_fn)
        if config is not None and _observes(config):
            require_finite(data)
        return super().train_mini_batch(data)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_batch(self, data: TensorDict) -> TensorDict:
        """One optimizer update, as verl's, with the trust region decided over all of `data` on all ranks before it."""
        config, loss_fn = actor_config(self.loss_fn), self.loss_fn
        if config is None or loss_fn is None or not _observes(config):
            return super().train_batch(data)
        mini_batch = MiniBatch()
        self._decide(data, config, mini_batch)
        average = self._averaging.policy(self.engine, config)
        if average is not None:
            mini_batch.averaged.extend(seen.tokens.raw_log_prob for seen in self.look_ahead(data, average.in_place))
        moving = nullcontext() if average is None else average.moved_by_updates()
        # Asked here, where the ages are in host memory: past the ramp of stale data no micro-batch has to be looked at.
        is_age_zero = self._is_age_zero(data)
        some_are_new = is_age_zero is not None and bool(is_age_zero.any())
        ages = self._is_age_zero if some_are_new else lambda _rows: None
        self.loss_fn = Observed(loss_fn, mini_batch, _observes_every_loss(config), ages)
        try:
            with training(mini_batch), self._scaling_step(_step_scale_of(config), mini_batch), moving:
                output = super().train_batch(data)
        finally:
            self.loss_fn = loss_fn
        self._updates_in_call += 1
        return self._with_metrics(output, mini_batch)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # pyright: ignore[reportAttributeAccessIssue]
    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """As verl's, with the averaged weights and the mismatch floor, which no row of age zero will measure again."""
        super().save_checkpoint(local_path, *args, **kwargs)
        self._averaging.save(Path(local_path))
        # Rank 0 of a pipeline has no outputs, and so no floor.
        writes = self.engine.is_mp_src_rank_with_outputs() and self.engine.get_data_parallel_rank() == 0
        if self._mismatch_floor is not None and writes:
            (Path(local_path) / WORKER_STATE_FILE).write_text(json.dumps({"mismatch_floor": self._mismatch_floor}))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # pyright: ignore[reportAttributeAccessIssue]
    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """As verl's, with the averaged weights and the mismatch floor, where the checkpoint has them."""
        super().load_checkpoint(local_path, *args, **kwargs)
        if not local_path:
            return
        self._averaging.load(Path(local_path))
        if (state := Path(local_path) / WORKER_STATE_FILE).exists():
            self._mismatch_floor = json.loads(state.read_text())["mismatch_floor"]

    def _decide(self, data: TensorDict, config: ActorConfig, mini_batch: MiniBatch) -> None:
        """Put the decision over all of `data` into `mini_batch`, or the order to make it in the one loss call."""
        loss = LOSSES.get(config.policy_loss.loss_mode)
        if loss is None or loss.decision is None or not loss.decides_over_mini_batch(config):
            return
        refuse_unsupported(self.engine_config, f"{KEY}.{loss.name}.scope=mini_batch")
        group, settings = self.engine.get_data_parallel_group(), loss.settings_in(config)
        subtracts_floor = loss.decision.subtracts_floor(settings)
        if not subtracts_floor and self._is_one_micro_batch(data):
            mini_batch.decide_in_loss, mini_batch.group = True, group
            return
        seen = self.look_ahead(data)
        if not seen:
            # A pipeline stage without outputs never calls the loss, and neither does the rest of its group.
            return
        floor = self._measure_mismatch_floor(seen, loss, group) if subtracts_floor else 0.0
        search = loss.decision.search(settings, floor)
        for micro_batch in seen:
            search.add(deciding_tokens(loss, micro_batch.tokens, config))
        mini_batch.decision = search.solve(group)

    @contextmanager
    def _scaling_step(self, settings: StepScaleConfig, mini_batch: MiniBatch) -> Iterator[None]:
        """Scale the optimizer step by the effective sample size of the mini-batch, known once every loss was called."""
        if not settings.is_on:
            yield
            return
        refuse_unsupported(self.engine_config, f"{KEY}.step_scale.power={settings.power}")
        mini_batch.weighs_responses = True
        engine: Any = self.engine

        @contextmanager
        def scaled() -> Iterator[None]:
            # All ranks, because pipeline stages without responses have parameters too.
            log_weight = torch.cat([torch.zeros(0, device=self.device_name), *mini_batch.log_weights])
            with scaled_by_effective_share(
                engine.optimizer, log_weight, settings.base_share, settings.exponent, dist.group.WORLD
            ) as metrics:
                mini_batch.metrics.update(metrics)
                yield

        with around_optimizer_step(engine, scaled):
            yield

    def look_ahead(
        self, data: TensorDict, weights: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> list[Seen]:
        """Response tokens of all micro-batches of `data`, packed as verl will train on them.

        Under the current policy, or what the engine has in the context that `weights` makes. Empty on a rank that
        computes no log-probs (pipeline stages before the last).
        """
        # A shallow copy: the engine writes its own keys.
        data = data.copy()
        packing = {
            "use_remove_padding": self.model_config.get("use_remove_padding", False),
            "use_fused_kernels": self.engine_config.use_fused_kernels,
            **self._packing(data),
        }
        missing = {key: value for key, value in packing.items() if key not in data.keys()}  # noqa: SIM118 (a TensorDict)
        unneeded = ("calculate_entropy", "calculate_sum_pi_squared", "distillation_use_topk", "distillation_only")
        tu.assign_non_tensor(data, **missing, **dict.fromkeys(unneeded, False))
        auto_offload_off = tu.get(data, key="disable_auto_offload", default=False)
        seen: list[Seen] = []

        def remember(
            model_output: dict[str, Any], data: TensorDict, dp_group: dist.ProcessGroup | None = None
        ) -> tuple[Tensor, dict]:
            tokens = response_tokens(model_output, data)
            seen.append(Seen(tokens, self._is_age_zero(data)))
            return torch.zeros((), device=tokens.mask.device), {}

        with self.engine.eval_mode(disable_auto_offload=auto_offload_off), weights():
            self.engine.infer_batch(data, loss_function=remember)
        return seen

    def _is_age_zero(self, data: TensorDict) -> Tensor | None:
        age_updates = data.get(AGE_FIELD, None)
        return None if age_updates is None else age_updates + self._updates_in_call == 0

    def _packing(self, data: TensorDict) -> dict[str, Any]:
        """How verl's `train_batch` will split `data` into micro-batches; what the data says wins."""
        keys = ("use_dynamic_bsz", "max_token_len_per_gpu", "micro_batch_size_per_gpu")
        return {key: tu.get(data, key=key, default=getattr(self.engine_config, key)) for key in keys}

    def _is_one_micro_batch(self, data: TensorDict) -> bool:
        """Whether every rank surely trains on `data` in one piece, so that the loss sees all of it at once."""
        packing = self._packing(data)
        if not packing["use_dynamic_bsz"]:
            return len(data) == packing["micro_batch_size_per_gpu"]
        input_ids: Any = data["input_ids"]
        if not input_ids.is_nested or not hasattr(self.engine, "ulysses_sequence_parallel_size"):
            # Other engines may split further than the number of tokens demands.
            return False
        tokens = input_ids.offsets()[-1].clone().to(self.device_name)
        # verl gives all ranks as many micro-batches as the fullest needs.
        dist.all_reduce(tokens, op=dist.ReduceOp.MAX, group=self.engine.get_data_parallel_group())
        return int(tokens) <= packing["max_token_len_per_gpu"]

    def _measure_mismatch_floor(self, seen: list[Seen], loss: Loss, group: dist.ProcessGroup | None) -> float:
        """Second moment of tokens that the very weights generated that look at them; the last known, 0 before any."""
        if seen[0].is_age_zero is None:
            raise ValueError(
                f"The mismatch floor of {KEY}.{loss.name} needs the age of each rollout (field {AGE_FIELD}), which "
                "this trainer mode does not give to the actor worker."
            )
        sums = torch.stack([age_zero_sums(micro_batch) for micro_batch in seen]).sum(0)
        if group is not None:
            dist.all_reduce(sums, group=group)
        square, count = sums.tolist()
        if count:
            self._mismatch_floor = square / count
        return 0.0 if self._mismatch_floor is None else self._mismatch_floor

    def _with_metrics(self, output: TensorDict | None, mini_batch: MiniBatch) -> TensorDict | None:
        """`output` with what is known of the whole mini-batch."""
        metrics = {**self._statistics(mini_batch), **mini_batch.metrics}
        if output is None or not metrics:
            return output
        named = {f"{diagnostics.PREFIX}{name}": value for name, value in metrics.items()}
        tu.assign_non_tensor(output, metrics={**tu.get(output, "metrics"), **named})
        return output

    def _statistics(self, mini_batch: MiniBatch) -> dict[str, float]:
        """Ratios over the whole mini-batch, formed once from sums over all ranks; none where no loss left a sum."""
        if not mini_batch.sums:
            return {}
        sums = diagnostics.added_up(mini_batch.sums)
        group = self.engine.get_data_parallel_group()
        if group is not None:
            dist.all_reduce(sums, group=group)
        metrics = diagnostics.mini_batch_metrics(sums, self._mismatch_floor)
        self._mismatch_floor = metrics.get("mismatch_floor")
        return metrics


def actor_config(loss_fn: Any) -> ActorConfig | None:
    """The actor settings inside a loss function of verl (`functools.partial(ppo_loss, config=...)`); None in others."""
    config = getattr(loss_fn, "keywords", {}).get("config", None)
    return None if getattr(config, "policy_loss", None) is None else config


def _observes(config: ActorConfig) -> bool:
    """Whether anything is decided or measured over the whole mini-batch."""
    loss = LOSSES.get(config.policy_loss.loss_mode)
    leaves_sums = loss is not None and loss.leaves_sums
    return leaves_sums or _observes_every_loss(config) or _step_scale_of(config).is_on


def _observes_every_loss(config: ActorConfig) -> bool:
    return bool(config.policy_loss.get("diagnostics", False))


def _step_scale_of(config: ActorConfig) -> StepScaleConfig:
    return settings_of(config, "step_scale", StepScaleConfig)


def refuse_unsupported(engine_config: Any, setting: str) -> None:
    """Raise where the tokens of a mini-batch cannot be counted once each, as `setting` needs."""
    if getattr(engine_config, "dynamic_context_parallel", False):
        raise NotImplementedError(
            f"{setting} cannot be honoured with Megatron's dynamic_context_parallel: verl gives no group of ranks that "
            "holds each token once. Switch one of them off (scope=micro_batch decides for each micro-batch)."
        )


def why_not_installed(worker_class: type = ActorRolloutRefWorker) -> str | None:
    """The reason why `worker_class` cannot decide over a whole mini-batch; None if it can. For preflight checks."""
    actor_worker = worker_class.actor_worker_cls
    if issubclass(actor_worker, M2POTrainingWorker):
        return None
    return (
        f"the actor worker is {actor_worker.__module__}.{actor_worker.__qualname__}, which something else put in the "
        "place of verl_m2po.actor.worker.M2POTrainingWorker. Derive it from that class, or switch the setting off"
    )


def install(worker_class: type = ActorRolloutRefWorker) -> None:
    """Make `worker_class` and all that derive from it use our actor worker, unless someone else's is there."""
    if worker_class.actor_worker_cls is TrainingWorker:
        worker_class.actor_worker_cls = M2POTrainingWorker


install()
