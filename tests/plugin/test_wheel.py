"""The wheel, installed outside the repository: complete, and enough for verl's entry point, the doctor and a run."""

import ast
import configparser
import re
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import recipe_runs
from composing import primaries
from omegaconf import OmegaConf
from user_environment import UserEnvironment, build_wheel, run

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
MAIN = ("python", "-m", "verl.trainer.main_ppo", "--cfg", "job")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(REPOSITORY, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def contents(wheel) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def user(wheel, tmp_path_factory) -> UserEnvironment:
    """A user with verl who installed the wheel; pip finds every requirement there, so it moves no version."""
    environment = UserEnvironment(tmp_path_factory.mktemp("user"))
    environment.pip("install", "--no-index", str(wheel))
    return environment


def tracked_files() -> list[str]:
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "verl_m2po", cwd=REPOSITORY)
    return [file for file in listed.splitlines() if (REPOSITORY / file).is_file()]


def test_every_file_of_the_package_is_in_it(contents):
    missing = set(tracked_files()) - set(contents)
    assert not missing


def test_nothing_else_is_in_it(contents):
    """verl's own wheel installs a top-level package `tests`; ours must not add to it."""
    assert {name.split("/")[0] for name in contents if ".dist-info/" not in name} == {"verl_m2po"}


def test_it_is_the_plugin_and_no_workshop(contents):
    """Benchmarks, the study and what draws the docs stay in the repository."""
    workshop = {
        file.name for folder in ("tests/benchmarks", "recipes/staleness_study", "docs") for file in python_files(folder)
    }
    assert {"authors_loop.py", "verl_runs.py", "generate_gallery.py"} <= workshop
    common = {"__init__.py", "__main__.py", *(file.name for file in python_files("verl_m2po"))}
    assert not {name for name in contents if Path(name).name in workshop - common}
    assert not {name for name in contents if re.search(r"bench(mark|/)|study|gallery", name)}
    assert not imported_by_the_package() & {"benchmarks", "staleness_study", "pages", "generate_gallery"}


def python_files(folder: str) -> Iterator[Path]:
    return (REPOSITORY / folder).rglob("*.py")


def imported_by_the_package() -> set[str]:
    trees = [ast.walk(ast.parse(file.read_text())) for file in python_files("verl_m2po")]
    nodes = [node for tree in trees for node in tree if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {
        m.split(".")[0] for m in modules | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    }


def test_entry_points(wheel, contents):
    (name,) = (name for name in contents if name.endswith("entry_points.txt"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(zipfile.ZipFile(wheel).read(name).decode())
    assert dict(entry_points["verl.plugins"]) == {"m2po": "verl_m2po.plugin"}
    assert dict(entry_points["console_scripts"]) == {"verl-m2po": "verl_m2po.cli.main:main"}


def test_the_user_imports_the_wheel_and_not_the_repository(user):
    printed = user.run("python", "-c", "import verl_m2po; print(verl_m2po.__file__)")
    assert Path(printed.strip()).is_relative_to(user.python.parents[1])


@pytest.mark.parametrize("recipe", ["arithmetic", "paper_table1"])
def test_recipes_are_there_for_verls_entry_point(user, recipe):
    assert recipe in primaries()
    printed = user.run(*MAIN, f"--config-name={recipe}")
    config = OmegaConf.create(printed[printed.index("actor_rollout_ref:") :])
    assert config.algorithm.policy_loss == "m2po"


def test_the_doctor_finds_everything(user):
    assert "everything is in place" in user.run("verl-m2po", "doctor", "--no-ray-worker")


def test_uninstalling_leaves_verl_as_it_was(wheel, tmp_path):
    environment = UserEnvironment(tmp_path)
    before = environment.run(*MAIN)
    assert "m2po" not in before
    environment.pip("install", "--no-index", "--no-deps", str(wheel))
    assert "m2po" in environment.run(*MAIN)
    environment.pip("uninstall", "--yes", "verl-m2po")
    assert environment.run(*MAIN) == before
    left = [file for file in environment.python.parents[1].rglob("*m2po*") if "__pycache__" not in file.parts]
    assert not left


def test_the_plugin_can_be_switched_off(user):
    process = subprocess.run(
        [str(user.python), *MAIN[1:]],
        cwd=user.home,
        capture_output=True,
        text=True,
        timeout=300,
        env={**user.variables, "VERL_USE_EXTERNAL_PLUGINS": "none"},
    )
    assert process.returncode == 0, process.stderr
    assert "verl_m2po" not in process.stdout and "stale_k" not in process.stdout


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_the_papers_recipe_takes_two_steps_from_the_wheel(user, tiny, addition, tmp_path):
    """Both at once: the wheel is all that a run needs, and the paper's recipe scales down by documented overrides."""
    recipe_runs.furnish(user.home, tiny, addition)
    runs = recipe_runs.run("paper_table1", tmp_path, user.python, user.variables)
    recipe_runs.check(runs)
    ((name, steps),) = runs.items()
    assert name == "m2po_stale_k_s4"
    assert [step["data"]["staleness/age_updates_max"] for step in steps] == [0, 4]
    assert all(step["data"]["actor/m2po/second_moment_before"] >= 0 for step in steps)
