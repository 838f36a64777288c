"""Has this machine the GPUs that a run asks for? Ray would wait for them for minutes, or verl fail after it started."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import read
from verl_m2po.launch.checks.numbers import DEVICES, NODES, ROLLOUT_DEVICES, ROLLOUT_NODES


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield what `config` asks for and this machine has not. Silent where Ray joins a cluster that may have it."""
    if read(config, "trainer.device") != "cuda" or _joins_a_cluster(config):
        return
    nodes, gpus = _needed(config)
    available = _available()
    if available == 0:
        yield Problem(
            "trainer.device",
            "cuda",
            f"the run needs {gpus} GPU(s), and this machine has none",
            "Add hardware=cpu (with model=tiny), or start Ray on the machines with `ray start` and run it there",
        )
    elif gpus > available:
        yield Problem(
            DEVICES.key,
            DEVICES.of(config),
            f"training and generation need {gpus} GPUs on {nodes} node(s); this machine has {available}, and no Ray "
            "cluster is running",
            "Use hardware=one_gpu, eight_gpu or eight_gpu_separate, set trainer.n_gpus_per_node, or start the cluster "
            "with `ray start`",
        )


def _needed(config: DictConfig) -> tuple[int, int]:
    """Nodes and GPUs that verl's resource pools ask for."""
    rollout_nodes, nodes = ROLLOUT_NODES.of(config) or 0, NODES.of(config)
    return nodes + rollout_nodes, nodes * DEVICES.of(config) + rollout_nodes * (ROLLOUT_DEVICES.of(config) or 0)


def _available() -> int:
    import torch

    return torch.cuda.device_count()


def _joins_a_cluster(config: DictConfig) -> bool:
    address = read(config, "ray_kwargs.ray_init.address")
    # Where `ray start` leaves the address of the cluster on this machine.
    running = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()), "ray", "ray_current_cluster").exists()
    return address not in (None, "local") or "RAY_ADDRESS" in os.environ or (address is None and running)
