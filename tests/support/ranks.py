"""Run a function on several real processes that share a process group, gloo unless asked otherwise."""

import multiprocessing
import os
import tempfile
import time
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 540
# Nine seconds of imports, done once: a rank is a copy of a process that has imported these and done nothing else.
PRELOADED = ["verl.workers.engine_workers", "verl_m2po.actor.worker", "verl_m2po.cpu.weight_transfer"]
# What they read as they are imported.
ENVIRONMENT = {"VERL_PLATFORM": "cpu", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}


def processes_on_the_cpu():
    """The context of multiprocessing in which a process starts as a copy of the one that has imported everything."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def run_on_ranks(world_sizes, function, *arguments, backend="gloo"):
    """{world size: results of `function(*arguments)` by rank}.

    Args:
        world_sizes: Numbers of ranks. The processes are started once, for the largest; rank r takes part in all sizes
            above r.
        function: Defined in a module of tests/support, since the processes import it by name.
        arguments: Passed on; results must be tensors or plain containers of them.
        backend: Of the process group; with nccl each rank has the GPU of its number.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.start_processes(
            _run,
            (world_sizes, folder, function, arguments, backend),
            nprocs=max(world_sizes),
            join=False,
            # CUDA bears no copy.
            start_method="spawn" if backend == "nccl" else processes_on_the_cpu().get_start_method(),
        )
        deadline = time.monotonic() + TIMEOUT_S
        # `join` returns False as soon as one of several processes has ended.
        while not processes.join(timeout=1):
            if time.monotonic() > deadline:
                for process in processes.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} on {world_sizes} ranks took more than {TIMEOUT_S} s.")
        return {size: [torch.load(Path(folder) / f"{size}-{rank}.pt") for rank in range(size)] for size in world_sizes}


def _run(rank, world_sizes, folder, function, arguments, backend):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for size in sorted(world_sizes, reverse=True):
        if rank >= size:
            return
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/rendezvous-{size}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        try:
            torch.save(function(*arguments), Path(folder) / f"{size}-{rank}.pt")
        finally:
            dist.destroy_process_group()
