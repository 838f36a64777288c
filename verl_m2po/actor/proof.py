"""The first optimizer update proves that the run trains what was asked for.

An entry point with a trainer of its own never reads `trainer.v1`, and a loss function of its own may drop the policy
loss. verl says nothing in either case. So the actor worker looks at its first update: was the loss called, did each of
its results reach the gradient, and do the rollouts carry the age that the trainer mode gives them? It reads one number
from the device, once, after the update, when verl reads its own.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from tensordict import TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import make_nd_compute_dataproto_dispatch_fn, register
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.workers.config import PolicyLossConfig
from verl.workers.engine_workers import TrainingWorker

from verl_m2po.ground.fields import AGE_FIELD
from verl_m2po.ground.modes import MODES


class NotWhatWasAskedError(RuntimeError):
    """The first optimizer update is not made as the run's configuration says."""


class ProvenTrainingWorker(TrainingWorker):
    """verl's training worker, which ends the run if its first update is not what a key of this package asks for."""

    _is_proven: bool = False

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_batch(self, data: TensorDict) -> TensorDict:
        """As verl's.

        Raises:
            NotWhatWasAskedError: It is the first one, and proves that another mode or loss trains.
        """
        policy_loss = None if self._is_proven else _asking(self.loss_fn)
        if policy_loss is None:
            return super().train_batch(data)
        require_mode(policy_loss.get("requested_mode", None), data)
        loss = WatchedLoss(policy_loss.loss_mode)
        with loss.watched():
            output = super().train_batch(data)
        # Pipeline stages before the last never call a loss.
        if self.engine.is_mp_src_rank_with_outputs():
            loss.require_trained()
        self._is_proven = True
        if torch.distributed.get_rank() == 0:
            Console().print(f"verl-m2po: the first optimizer update is made by the loss {policy_loss.loss_mode}")
        return output


def require_mode(requested: str | None, data: TensorDict) -> None:
    """Raise NotWhatWasAskedError if a mode of ours is `requested` and another trainer made the mini-batch `data`."""
    if requested in MODES and AGE_FIELD not in data.keys():  # noqa: SIM118 (a TensorDict)
        raise NotWhatWasAskedError(
            f"trainer.v1.trainer_mode={requested} was asked for, and another trainer makes the first update: its rows "
            f"have no {AGE_FIELD}, which that mode gives to each. This entry point has a trainer of its own and never "
            "reads trainer.v1, so the staleness that was asked for is ignored. Start `python -m verl.trainer.main_ppo` "
            f"instead, or leave out trainer.v1.trainer_mode and trainer.v1.{requested}.*."
        )


class WatchedLoss:
    """Sees whether the registered loss `name` trains.

    Args:
        name: In verl's registry of policy losses.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls = 0
        self._gradients: list[Tensor] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the loss in this block, in this process."""
        loss = POLICY_LOSS_REGISTRY[self._name]
        POLICY_LOSS_REGISTRY[self._name] = self._watching(loss)
        try:
            yield
        finally:
            POLICY_LOSS_REGISTRY[self._name] = loss

    def _watching(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(loss)
        def called(*args: Any, **kwargs: Any) -> Any:
            value, metrics = loss(*args, **kwargs)
            self._calls += 1
            if value.requires_grad:
                # Lasts for as long as the graph. verl subtracts the entropy in place: the hook keeps to what it is now.
                value.register_hook(self._gradients.append)
            return value, metrics

        return called

    def require_trained(self) -> None:
        """Raise NotWhatWasAskedError unless each result of the loss had a gradient, and not all of them 0."""
        asked = f"the policy loss {self._name!r} was asked for, and the first update"
        if self._calls == 0:
            raise NotWhatWasAskedError(
                f"{asked} was made without calling it: this entry point trains with a loss function of its own. Start "
                "`python -m verl.trainer.main_ppo` instead, or leave out algorithm.policy_loss."
            )
        reached = len(self._gradients) if self._has_gradient() else 0
        if reached < self._calls:
            raise NotWhatWasAskedError(
                f"{asked} threw it away: {reached} of {self._calls} results of it reached the gradient. Something "
                "after it drops it; in distillation that is distillation.distillation_loss.use_task_rewards=false. "
                "Set that to true, or leave out algorithm.policy_loss."
            )

    def _has_gradient(self) -> bool:
        return bool(self._gradients) and bool(torch.stack(self._gradients).ne(0).any())


def _asking(loss_fn: Any) -> PolicyLossConfig | None:
    """The policy loss settings inside a loss function of verl, if a loss or a mode of this package is asked for."""
    loss_fn = getattr(loss_fn, "loss_fn", loss_fn)  # our own around verl's
    policy_loss = getattr(getattr(loss_fn, "keywords", {}).get("config", None), "policy_loss", None)
    if policy_loss is None:
        return None
    loss = POLICY_LOSS_REGISTRY[policy_loss.loss_mode]
    is_ours = loss.__module__.startswith("verl_m2po.") or policy_loss.get("requested_mode", None) in MODES
    return policy_loss if is_ours or policy_loss.get("selected", None) is not None else None
