"""Run a function on several real processes that share a gloo process group."""

import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 120


def run_on_ranks(world_size, function, *arguments):
    """Results of `function(*arguments)` on ranks 0 .. world_size - 1.

    Args:
        world_size: Number of processes.
        function: Defined in a module of tests/support, since the processes import it by name.
        arguments: Passed on; results must be tensors or plain containers of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.start_processes(
            _run, (world_size, folder, function, arguments), nprocs=world_size, join=False, start_method="spawn"
        )
        deadline = time.monotonic() + TIMEOUT_S
        # `join` returns False as soon as one of several processes has ended.
        while not processes.join(timeout=1):
            if time.monotonic() > deadline:
                for process in processes.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} on {world_size} ranks took more than {TIMEOUT_S} s.")
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world_size)]


def _run(rank, world_size, folder, function, arguments):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
