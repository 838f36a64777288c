"""The wheel, installed outside the repository: complete, and enough for verl's entry point and the doctor."""

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from composing import primaries
from omegaconf import OmegaConf

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "verl_m2po"


def run(*command: str, cwd: Path, **environment: str) -> str:
    """What `command` prints; fails with what it says on stderr."""
    process = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), cwd=REPOSITORY)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def contents(wheel) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def user(wheel, tmp_path_factory):
    """A user's Python: the wheel in a folder of its own, verl from this environment, the repository nowhere."""
    site = tmp_path_factory.mktemp("site")
    home = tmp_path_factory.mktemp("somewhere-else")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel), cwd=home)

    def python(*arguments: str) -> str:
        return run(sys.executable, *arguments, cwd=home, PYTHONPATH=str(site))

    return python


def tracked_files() -> list[str]:
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "verl_m2po", cwd=REPOSITORY)
    return [file for file in listed.splitlines() if (REPOSITORY / file).is_file()]


def test_every_file_of_the_package_is_in_it(contents):
    missing = set(tracked_files()) - set(contents)
    assert not missing


def test_nothing_else_is_in_it(contents):
    """verl's own wheel installs a top-level package `tests`; ours must not add to it."""
    assert {name.split("/")[0] for name in contents if ".dist-info/" not in name} == {"verl_m2po"}


def test_entry_points(wheel, contents):
    (name,) = (name for name in contents if name.endswith("entry_points.txt"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(zipfile.ZipFile(wheel).read(name).decode())
    assert dict(entry_points["verl.plugins"]) == {"m2po": "verl_m2po.plugin"}
    assert dict(entry_points["console_scripts"]) == {"verl-m2po": "verl_m2po.cli:main"}


def test_the_user_imports_the_wheel_and_not_the_repository(user):
    printed = user("-c", "import verl_m2po; print(verl_m2po.__file__)")
    assert not Path(printed.strip()).is_relative_to(REPOSITORY)


@pytest.mark.parametrize("recipe", ["arithmetic", "paper_table1"])
def test_recipes_are_there_for_verls_entry_point(user, recipe):
    assert recipe in primaries()
    printed = user("-m", "verl.trainer.main_ppo", f"--config-name={recipe}", "--cfg", "job")
    config = OmegaConf.create(printed[printed.index("actor_rollout_ref:") :])
    assert config.algorithm.policy_loss == "m2po"


def test_the_doctor_finds_everything(user):
    printed = user("-c", "from verl_m2po.cli import main; main()", "doctor", "--no-ray-worker")
    assert "everything is in place" in printed


def test_without_the_plugin_verl_knows_nothing_of_it():
    printed = run(
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        "--cfg",
        "job",
        cwd=REPOSITORY.parent,
        VERL_USE_EXTERNAL_PLUGINS="none",
    )
    assert "verl_m2po" not in printed and "stale_k" not in printed
