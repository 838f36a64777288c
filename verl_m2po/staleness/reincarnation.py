# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# verl's engines have an optimizer and a module where they train.
"""The worker in whose process the reference becomes the actor, and the weights that a restart needs again."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker


class ReincarnatingWorker(ActorRolloutRefWorker):
    """verl's worker, whose reference can become its actor."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reincarnate(self, folder: str) -> None:
        """The reference takes the actor's weights, and keeps them in `folder`; the optimizer begins anew."""
        assert self.actor is not None
        self.actor.engine.optimizer.state.clear()
        if self.ref is not None:
            copy_weights(self.actor.engine.module, self.ref.engine.module)
            save_weights(self.ref.engine.module, self._file(folder))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_reference(self, folder: str) -> None:
        """The reference takes the weights that `reincarnate` kept in `folder`."""
        if self.ref is not None:
            load_weights(self.ref.engine.module, self._file(folder))

    def _file(self, folder: str) -> Path:
        return Path(folder) / f"rank_{self.rank}_of_{self.world_size}.safetensors"


def _shards(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers as far as they lie on this rank, by name."""
    for name, each in (*module.named_parameters(), *module.named_buffers()):
        yield name, each.to_local() if isinstance(each, DTensor) else each.detach()


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Copy the shards of one model into another of the same architecture, cut up in the same way."""
    for (_, theirs), (_, mine) in zip(_shards(source), _shards(target), strict=True):
        mine.copy_(theirs)


def save_weights(module: torch.nn.Module, path: Path) -> None:
    """Write this rank's shards; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    incomplete = path.with_suffix(".incomplete")
    save_file({name: shard.detach().cpu().contiguous().clone() for name, shard in _shards(module)}, incomplete)
    os.replace(incomplete, path)


@torch.no_grad()
def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Read them back.

    Raises:
        FileNotFoundError: they are not there.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: the run goes on from a checkpoint after its reincarnation, whose reference is lost. "
            "Resume from an earlier checkpoint, or bring the file back"
        )
    weights = load_file(path)
    for name, shard in _shards(module):
        shard.copy_(weights[name])
