"""Do all machines of a run see the folder of its checkpoints? Each rank writes its part of one, and reads it again."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import ray
from omegaconf import DictConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl_m2po.ground.problem import Problem

KEY = "trainer.default_local_dir"

ANSWER_S = 60.0
"""How long a machine may take to look; one that does not answer is not judged here."""


def problems(config: DictConfig, who_sees: Callable[[Path], dict[str, bool]] | None = None) -> Iterator[Problem]:
    """Yield that checkpoints would be written to a folder that some machines have for themselves.

    Args:
        config: verl's.
        who_sees: by the name of each machine, whether it sees a file; None asks Ray's.
    """
    folder = Path(config.trainer.default_local_dir)
    if config.trainer.save_freq <= 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-by-all-") as file:
        seen = (machines_that_see if who_sees is None else who_sees)(Path(file.name))
    if blind := sorted(machine for machine, sees in seen.items() if not sees):
        why = f"what is written there is not seen on {', '.join(blind)}"
        yield Problem(KEY, str(folder), why, "Name a folder on a filesystem that all machines share")


def _sees(path: Path) -> bool:
    return path.exists()


def machines_that_see(path: Path) -> dict[str, bool]:
    """Ask the other machines of Ray's cluster whether they see `path`, an absolute one."""
    here = ray.get_runtime_context().get_node_id()
    others = {
        node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here
    }
    look = ray.remote(num_cpus=0)(_sees)
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(path.resolve()): name
        for node, name in others.items()
    }
    answered = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)[0] if asked else []
    return {asked[answer]: ray.get(answer) for answer in answered}
