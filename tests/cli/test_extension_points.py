"""What this package holds on to in verl is where it was, and each point is run by a test."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from verl_m2po.cli import extension_points
from verl_m2po.cli.extension_points import POINTS, moved

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "verl_m2po"


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_the_installed_verl_has_it(point):
    assert list(moved((point,))) == []


def test_what_moved_is_named_with_its_use_and_its_test():
    point = POINTS[-1]
    gone = dataclasses.replace(point, name=f"{point.name}_of_before")
    changed = dataclasses.replace(point, parameters="self, global_steps=, mode=")
    said = list(moved((gone, changed)))
    assert len(said) == 2 and "is gone" in said[0]
    assert "takes (self, global_steps=), and took (self, global_steps=, mode=)" in said[1]
    assert all(point.use in each and point.test in each for each in said)


@pytest.mark.parametrize("test", sorted({point.test for point in POINTS}))
def test_its_test_is_there(test):
    assert (REPOSITORY / test).is_file()


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_it_is_used(point):
    """By the name of the method, or of the class for its constructor."""
    parts = point.name.split(".")
    name = parts[-2] if parts[-1] == "__init__" else parts[-1]
    sources = [file for file in PACKAGE.rglob("*.py") if file != Path(extension_points.__file__)]
    assert any(name in file.read_text() for file in sources)


def test_the_command_says_where_verl_is():
    done = subprocess.run(
        [sys.executable, "-m", "verl_m2po.cli.extension_points"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith(f"0 of {len(POINTS)} points moved, 0 constructions fail")
