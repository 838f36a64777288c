"""An average over the weights of past optimizer updates, and the policy that has them: PPO-EWMA's proximal policy.

See "Batch size-invariance for policy optimization" (arXiv:2110.00641) and `EwmaModel` in openai/ppo-ewma.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from verl.workers.config import ActorConfig

from verl_m2po.losses.kernel.registry import LOSSES
from verl_m2po.patches.verl import around_optimizer_step

TOTAL = "total_weight"
"""In the metadata of a saved average: sum of the weights that its mean has."""


class State(NamedTuple):
    """What a checkpoint keeps of an average.

    Args:
        means: This rank's shard of each trainable parameter, by name, at least float32.
        total: Sum of the weights of the mean, at least 1.
    """

    means: dict[str, Tensor]
    total: float


class AveragedWeights:
    """Exponentially weighted mean of parameters over optimizer updates, without bias towards the first.

    A parameter that is shared out over ranks is averaged shard by shard, each rank its own. Costs one more copy of the
    trainable parameters, where they lie as it is made, and another one while it is `in_place`.

    Args:
        parameters: Names and parameters, asked for anew each time: an engine may move them.
        decay: Weight of the mean so far at each update, in [0, 1); 0: the mean is what the last update made.
        state: To go on from; None: the mean is of the present weights alone.
    """

    def __init__(
        self, parameters: Callable[[], Iterable[tuple[str, Tensor]]], decay: float, state: State | None = None
    ) -> None:
        self._parameters = parameters
        self.decay = decay
        if state is None:
            self.state = State({name: _at_least_float32(shard.clone()) for name, shard in self._shards()}, 1.0)
        else:
            # A checkpoint is read into host memory.
            self.state = State(
                {name: state.means[name].to(shard.device) for name, shard in self._shards()}, state.total
            )

    def _shards(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters():
            if parameter.requires_grad:
                yield name, _local(parameter.detach())

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in, after an optimizer update."""
        means, total = self.state.means, self.decay * self.state.total + 1
        for name, shard in self._shards():
            means[name].lerp_(shard.to(means[name]), 1 / total)
        self.state = State(means, total)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters have the mean in the block, and their own values afterwards, bit by bit."""
        with torch.no_grad():
            own = {name: shard.clone() for name, shard in self._shards()}
            _copy_into(self._shards(), self.state.means)
        try:
            yield
        finally:
            with torch.no_grad():
                _copy_into(self._shards(), own)


class AveragedPolicy:
    """A training engine of verl's with averaged weights.

    Args:
        engine: verl's FSDP engine.
        decay: See `AveragedWeights`.
        state: To go on from, or None.
    """

    def __init__(self, engine: Any, decay: float, state: State | None) -> None:
        self._engine = engine
        self.weights = AveragedWeights(engine.module.named_parameters, decay, state)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The engine computes with the averaged weights in the block, which is inside its own of evaluation."""
        _give_up_gathered(self._engine.module)
        with self.weights.in_place():
            try:
                yield
            finally:
                _give_up_gathered(self._engine.module)

    @contextmanager
    def moved_by_updates(self) -> Iterator[None]:
        """Every optimizer update in the block is taken into the average."""

        @contextmanager
        def taken_in() -> Iterator[None]:
            yield
            self.weights.update()

        with around_optimizer_step(self._engine, taken_in):
            yield


def decay_of(config: ActorConfig) -> float | None:
    """Of the average that the loss of `config` looks at; None where it looks at none."""
    loss = LOSSES.get(config.policy_loss.loss_mode)
    if loss is None or loss.averaging_decay is None:
        return None
    return loss.averaging_decay(loss.settings_in(config))


class Averaging:
    """The averaged policy of a worker from the first loss on that looks at it, over restarts too."""

    def __init__(self) -> None:
        self._policy: AveragedPolicy | None = None
        self._saved: State | None = None

    def policy(self, engine: Any, config: ActorConfig) -> AveragedPolicy | None:
        """What the loss of `config` looks at, of `engine`; None where it looks at none."""
        if (decay := decay_of(config)) is None:
            return None
        if self._policy is None:
            self._policy = AveragedPolicy(engine, decay, self._saved)
        return self._policy

    def save(self, folder: Path) -> None:
        """Write this rank's part into the checkpoint `folder`, where there is an average."""
        if self._policy is not None:
            state = self._policy.weights.state
            means = {name: mean.contiguous() for name, mean in state.means.items()}
            save_file(means, _file(folder), metadata={TOTAL: repr(state.total)})

    def load(self, folder: Path) -> None:
        """Go on with what `save` wrote; where it wrote nothing, with the mean of the weights that are loaded alone."""
        # At once: verl may delete the folder.
        self._policy, self._saved = None, _saved_in(folder)


def _give_up_gathered(module: torch.nn.Module) -> None:
    """Let FSDP gather parameters anew whose shards have changed: after a forward pass it keeps the root's, for one."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
        elif isinstance(part, FullyShardedDataParallel) and part._handle and part._handle.uses_sharded_strategy:
            part._handle.reshard(True)


def _saved_in(folder: Path) -> State | None:
    path = _file(folder)
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        means = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return State(means, float(file.metadata()[TOTAL]))


def _file(folder: Path) -> Path:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return folder / f"m2po_average_world_size_{size}_rank_{rank}.safetensors"


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _copy_into(shards: Iterable[tuple[str, Tensor]], values: dict[str, Tensor]) -> None:
    for name, shard in shards:
        shard.copy_(values[name])
