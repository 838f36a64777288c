"""The two steps on the CPU that each recipe's README promises, run as they stand there."""

import math
import re
import shlex
from pathlib import Path

import cpu_run

RECIPES = Path(__file__).parents[2] / "recipes"
TIMEOUT_S = 540
HEADING = "## Two steps on the CPU"


def names() -> list[str]:
    """Every recipe that is one command of verl's; the study is a program of its own."""
    return sorted(script.parent.name for script in RECIPES.glob("*/run_*.sh"))


def cpu_command(recipe: str) -> list[str]:
    """The command of `recipe`'s README, as a shell splits it."""
    _, _, section = (RECIPES / recipe / "README.md").read_text().partition(HEADING)
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block, f"recipes/{recipe}/README.md has no command under {HEADING!r}"
    return shlex.split(block[1].replace("\\\n", " "))


def run(recipe: str, folder: Path, python: Path, environment: dict[str, str]) -> dict[str, list[dict]]:
    """Run the command of `recipe`'s README in `folder` with the interpreter `python`; the logged steps of each run."""
    command = cpu_command(recipe)
    assert command[:3] == ["python", "-m", "verl.trainer.main_ppo"], command
    command = [str(python), *command[1:], cpu_run.LOCAL_RAY]
    logs = folder / "logs"
    result = cpu_run.run_command(folder, command, TIMEOUT_S, {**environment, "VERL_FILE_LOGGER_ROOT": str(logs)})
    assert result.status == 0, result.tail
    return {file.stem: cpu_run.read_steps(file) for file in logs.rglob("*.jsonl")}


def check(runs: dict[str, list[dict]]) -> None:
    """Every run of a recipe took its two steps, with responses that differ and a gradient that is a number."""
    assert runs
    for name, steps in runs.items():
        trained = [step["data"] for step in steps if "actor/grad_norm" in step["data"]]
        assert len(trained) == 2, name
        for data in trained:
            assert math.isfinite(data["actor/pg_loss"]) and math.isfinite(data["actor/grad_norm"]), name
            assert data["response_length/mean"] > 0, name


def furnish(home: Path, tiny: Path, addition: Path) -> None:
    """Put model and data where the recipes look for them below `home`."""
    for link, target in ((home / "models" / "verl-m2po-tiny", tiny), (home / "data" / "arithmetic", addition)):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
