# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false, reportArgumentType=false
# torch's stubs leave out gloo's options and TCPStore; verl's registry decorates with a plain function.
"""verl's checkpoint engine for separate trainer and rollout processes without CUDA: gloo broadcasts, no pickle.

Rank 0 of the trainer broadcasts to every rollout worker. Each message is a header of integers, a JSON description of
the tensors, and their bytes; version and checksum are verified before a weight is handed on.
"""

import json
import socket
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import ray
import torch
import torch.distributed as dist
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

TIMEOUT_S = 120
MEETING_TIMEOUT_S = 30
"""Short: all peers have just answered `prepare`. A peer that dies on its way here leaves the others waiting so long."""

_NOT_A_MEMBER = -1


class Header(NamedTuple):
    """What precedes a bucket on the wire, as int64."""

    version: int
    description_bytes: int
    payload_bytes: int
    checksum: int
    is_last: int


class WeightTransferError(RuntimeError):
    """The weights that arrived are not the weights that were asked for."""


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    """Moves weights from the trainer to the rollout workers over gloo.

    Args:
        bucket_size: Bytes per message (``checkpoint_engine.update_weights_bucket_megabytes``). A larger tensor travels
            alone.
        is_master: Whether this is rank 0 of the trainer.
        timeout_s: Seconds after which a peer that does not answer is an error. verl itself would wait for ever.
        meeting_timeout_s: The same for a peer that does not come to the group of a sync.
    """

    def __init__(
        self,
        bucket_size: int,
        is_master: bool = False,
        timeout_s: int = TIMEOUT_S,
        meeting_timeout_s: int = MEETING_TIMEOUT_S,
    ) -> None:
        self.bucket_size = bucket_size
        self.is_master = is_master
        self.timeout = timedelta(seconds=timeout_s)
        self.meeting_timeout = timedelta(seconds=meeting_timeout_s)
        self.listener: socket.socket | None = None
        self.group: Any = None

    def prepare(self) -> dict[str, Any] | None:
        """Return where to meet: host and port of the trainer's rank 0."""
        if not self.is_master:
            return None
        # Ray's node address is the loopback one unless the user opened the cluster up.
        host = ray.util.get_node_ip_address().strip("[]")
        self.listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        return {"host": host, "port": self.listener.getsockname()[1]}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Rank 0 of the trainer and every rollout worker form one group; the other trainer ranks stay out."""
        size = rollout_world_size + 1
        actor_ranks = [0] + [_NOT_A_MEMBER] * (actor_wg_world_size - 1)
        rollout_ranks = list(range(1, size))
        return tuple(  # type: ignore[return-value]
            {"rank": ranks, "world_size": [size] * len(ranks), "master": [metadata[0]] * len(ranks)}
            for ranks in (actor_ranks, rollout_ranks)
        )

    def init_process_group(self, rank: int, world_size: int, master: dict[str, Any]) -> None:
        """Join the group that lives for one sync.

        Raises:
            WeightTransferError: A peer has not come within `meeting_timeout_s`.
        """
        if rank == _NOT_A_MEMBER:
            return
        store = self._store(rank, world_size, master)
        self._meet(store, rank, world_size)
        options = dist.ProcessGroupGloo._Options()
        # Of connecting: a message has a limit of its own.
        options._timeout = self.meeting_timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=ray.util.get_node_ip_address().strip("[]"))]
        self.group = dist.ProcessGroupGloo(store, rank, world_size, options)

    def _store(self, rank: int, world_size: int, master: dict[str, Any]) -> dist.TCPStore:
        listener = {}
        if rank == 0:
            assert self.listener is not None, "prepare() comes before init_process_group()"
            listener["master_listen_fd"] = self.listener.detach()
            self.listener = None
        return dist.TCPStore(
            master["host"],
            master["port"],
            world_size,
            is_master=rank == 0,
            timeout=self.timeout,
            wait_for_workers=False,
            **listener,
        )

    def _meet(self, store: dist.TCPStore, rank: int, world_size: int) -> None:
        places = [f"rank {each} is here" for each in range(world_size)]
        store.set(places[rank], "")
        try:
            store.wait(places, self.meeting_timeout)
        except dist.DistStoreError as error:
            missing = [each for each, place in enumerate(places) if not store.check([place])]
            raise WeightTransferError(
                f"of the {world_size} ranks of a push of weights, {missing} did not come within "
                f"{self.meeting_timeout.total_seconds():.0f} s (0 is the trainer, the others are rollout workers)"
            ) from error

    def finalize(self) -> None:
        """Leave the group and close what is still open."""
        self.group = None
        if self.listener is not None:
            self.listener.close()
            self.listener = None

    @torch.no_grad()
    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, float]:
        """Broadcast `weights` as version `global_steps`.

        Every trainer rank must call this, since materialising a weight is collective; only rank 0 sends.

        Args:
            weights: (name, tensor) pairs, any dtype and shape.
            global_steps: The weight version.

        Returns:
            Bytes sent and buckets, for the step's metrics.
        """
        version = -1 if global_steps is None else global_steps
        sent_bytes = buckets = 0
        for bucket, is_last in _buckets(weights, self.bucket_size):
            if self.is_master:
                sent_bytes += self._send(bucket, version, is_last)
                buckets += 1
        if not self.is_master:
            return {}
        return {"weight_transfer/megabytes": sent_bytes / 2**20, "weight_transfer/buckets": float(buckets)}

    def _send(self, bucket: list[tuple[str, torch.Tensor]], version: int, is_last: bool) -> int:
        description = _as_bytes(json.dumps([_describe(name, tensor) for name, tensor in bucket]).encode())
        payload = torch.cat([_flat_bytes(tensor) for _, tensor in bucket]) if bucket else torch.empty(0).byte()
        checksum = zlib.crc32(payload.numpy())
        header = Header(version, description.numel(), payload.numel(), checksum, int(is_last))
        for message in (torch.tensor(header, dtype=torch.int64), description, payload):
            self._broadcast(message)
        return payload.numel()

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Yield the (name, tensor) pairs of one sync.

        Args:
            global_steps: The weight version that is expected; None accepts any.

        Raises:
            WeightTransferError: The version or the checksum is not the expected one.
        """
        while True:
            header, bucket = self._receive(global_steps)
            for name, tensor in bucket:
                yield name, tensor
            if header.is_last:
                return

    def _receive(self, expected_version: int | None) -> tuple[Header, list[tuple[str, torch.Tensor]]]:
        header = Header(*self._broadcast(torch.empty(len(Header._fields), dtype=torch.int64)).tolist())
        description = self._broadcast(torch.empty(header.description_bytes, dtype=torch.uint8))
        payload = self._broadcast(torch.empty(header.payload_bytes, dtype=torch.uint8))
        if expected_version is not None and header.version != expected_version:
            raise WeightTransferError(
                f"rollout expected weight version {expected_version}, the trainer sent {header.version}"
            )
        if zlib.crc32(payload.numpy()) != header.checksum:
            raise WeightTransferError(f"checksum mismatch in the weights of version {header.version}")
        return header, list(_unpack(json.loads(description.numpy().tobytes()), payload))

    def _broadcast(self, message: torch.Tensor) -> torch.Tensor:
        if message.numel():
            options = dist.BroadcastOptions()
            options.rootRank, options.timeout = 0, self.timeout
            self.group.broadcast([message], options).wait()
        return message


def _as_bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _describe(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    return {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _unpack(description: list[dict[str, Any]], payload: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    offset = 0
    for entry in description:
        dtype = getattr(torch, entry["dtype"])
        tensor = torch.empty(entry["shape"], dtype=dtype)
        size = tensor.numel() * dtype.itemsize
        # Copied rather than viewed: a view would need the offset to be a multiple of the item size.
        tensor.view(-1).view(torch.uint8).copy_(payload[offset : offset + size])
        offset += size
        yield entry["name"], tensor


def _buckets(
    weights: Iterable[tuple[str, torch.Tensor]], bucket_size: int
) -> Iterator[tuple[list[tuple[str, torch.Tensor]], bool]]:
    """Group `weights` into lists of at most `bucket_size` bytes; the flag marks the last list, which always comes."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > bucket_size:
            yield bucket, False
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    yield bucket, True
