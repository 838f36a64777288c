"""Two sides of a weight transfer, each in a process of its own."""

import asyncio
from typing import Any

import torch
from ranks import processes_on_the_cpu

BUCKET_BYTES = 256
LIMIT_S = 120
"""Of a peer that has to start first."""


def weights(seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    """Weights of mixed types and odd sizes; one is larger than a bucket, one is empty, one is a scalar."""
    generator = torch.Generator().manual_seed(seed)
    return [
        ("half", torch.randn(3, generator=generator).to(torch.bfloat16)),
        ("matrix", torch.randn(5, 7, generator=generator)),
        ("large", torch.randn(1000, generator=generator)),
        ("transposed", torch.randn(4, 6, generator=generator).t()),
        ("integers", torch.arange(5, dtype=torch.int64)),
        ("empty", torch.empty(0, 3)),
        ("scalar", torch.tensor(3.5, dtype=torch.float64)),
    ]


def _receive(rank: int, world_size: int, master: dict, version: int | None, timeout_s: int, results: Any) -> None:
    from verl_m2po.cpu.weight_transfer import GlooCheckpointEngine

    async def collect(engine: GlooCheckpointEngine) -> list[tuple[str, torch.Tensor]]:
        return [(name, tensor) async for name, tensor in engine.receive_weights(version)]

    engine = GlooCheckpointEngine(BUCKET_BYTES, timeout_s=timeout_s, meeting_timeout_s=LIMIT_S)
    try:
        engine.init_process_group(rank, world_size, master)
        got = asyncio.run(collect(engine))
        results.put((rank, [(name, str(t.dtype), tuple(t.shape), t.double().flatten().tolist()) for name, t in got]))
    except Exception as error:
        results.put((rank, f"{type(error).__name__}: {error}"))
    finally:
        engine.finalize()


def transfer(
    receivers: int, sent_version: int | None, expected_version: int | None, timeout_s: int = LIMIT_S
) -> list[Any]:
    """Send `weights()` from this process to `receivers` others; return what each saw, or its error, by rank.

    Args:
        receivers: How many.
        sent_version: None sends nothing at all.
        expected_version: By the receivers.
        timeout_s: Of a message, at the receivers.
    """
    from verl_m2po.cpu.weight_transfer import GlooCheckpointEngine

    context = processes_on_the_cpu()
    results = context.Queue()
    sender = GlooCheckpointEngine(BUCKET_BYTES, is_master=True, timeout_s=LIMIT_S, meeting_timeout_s=LIMIT_S)
    master = sender.prepare()
    trainer, rollout = GlooCheckpointEngine.build_topology(1, receivers, [master])
    peers = [
        context.Process(
            target=_receive,
            args=(rank, receivers + 1, master, expected_version, timeout_s, results),
            daemon=True,
        )
        for rank in rollout["rank"]
    ]
    for peer in peers:
        peer.start()
    sender.init_process_group(trainer["rank"][0], receivers + 1, master)
    try:
        if sent_version is not None:
            asyncio.run(sender.send_weights(iter(weights()), sent_version))
    except RuntimeError:
        assert expected_version not in (None, sent_version), "the sender may fail only after a receiver refused"
    seen = dict(results.get(timeout=180) for _ in peers)
    sender.finalize()
    for peer in peers:
        peer.join(30)
    return [seen[rank] for rank in sorted(seen)]
