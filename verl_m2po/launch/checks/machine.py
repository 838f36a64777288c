"""Is this machine able to run verl without a GPU? Asked only of runs that chose the CPU platform."""

import importlib.util
import os
import socket
from collections.abc import Iterator

import psutil
from omegaconf import DictConfig

from verl_m2po.cpu import environment
from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import read

# Peak of a run with the tiny model: 6.7-7.6 GB, most of it the code of ten processes.
MEMORY_GIB = 8
# Ray, vLLM and TransferQueue open about this many.
_PORTS = 32


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield what is wrong with this machine for `config`."""
    if read(config, "trainer.device") != environment.PLATFORM_NAME:
        return
    yield from _gpu()
    yield from _memory()
    yield from _ports()
    yield from _vllm(config)
    yield from _executor(config)
    yield from _ray(config)


def _gpu() -> Iterator[Problem]:
    import torch

    if torch.cuda.is_available():
        yield Problem(
            "hardware",
            "cpu",
            f"this machine has a GPU ({torch.cuda.get_device_name(0)}), and vLLM and torch would each pick a device of "
            "their own",
            "Use hardware=one_gpu, or hide the GPU with CUDA_VISIBLE_DEVICES=''",
        )


def _memory() -> Iterator[Problem]:
    available = psutil.virtual_memory().available / 2**30
    if available < MEMORY_GIB:
        yield Problem(
            "available memory",
            f"{available:.1f} GiB",
            f"a CPU run needs {MEMORY_GIB} GiB, or the kernel kills one of its processes on the way",
            "Close other programs, or `ray stop --force` if an old run is left behind",
        )


def _ports() -> Iterator[Problem]:
    sockets = []
    try:
        for _ in range(_PORTS):
            sockets.append(socket.create_server(("127.0.0.1", 0)))
    except OSError as error:
        yield Problem(
            "free ports on 127.0.0.1",
            len(sockets),
            f"Ray, vLLM and TransferQueue need about {_PORTS} ({error})",
            "Stop old runs, or widen net.ipv4.ip_local_port_range",
        )
    finally:
        for opened in sockets:
            opened.close()


def _vllm(config: DictConfig) -> Iterator[Problem]:
    name = read(config, "actor_rollout_ref.rollout.name")
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        yield Problem(
            "actor_rollout_ref.rollout.name",
            name,
            "vLLM is not installed in this environment",
            "Install its CPU build with `make env`, or as verl_m2po/cpu/constraints.txt says",
        )


def _executor(config: DictConfig) -> Iterator[Problem]:
    """vLLM's worker in the engine's own process is one worker; verl would wait for the others for ever."""
    key = "actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend"
    executor, size = read(config, key), read(config, "actor_rollout_ref.rollout.tensor_model_parallel_size")
    if executor == "uni" and size != 1:
        yield Problem(
            key,
            executor,
            f"it runs one worker, and actor_rollout_ref.rollout.tensor_model_parallel_size={size} needs more: the "
            "start of the server would hang",
            f"Set {key}=mp",
        )


def _ray(config: DictConfig) -> Iterator[Problem]:
    import ray
    from ray._private import services

    # The jobs of a sweep share the cluster that the first of them started.
    if read(config, "ray_kwargs.ray_init.address") is not None or ray.is_initialized():
        return
    found = os.environ.get("RAY_ADDRESS") or services.find_bootstrap_address(None)
    if found:
        yield Problem(
            "ray_kwargs.ray_init.address",
            None,
            f"Ray would join the cluster at {found}, which a `ray start` left behind, and refuse the logical resources "
            "of hardware=cpu",
            "Run `ray stop` and unset RAY_ADDRESS, or start a cluster beside it with ray_kwargs.ray_init.address=local",
        )
