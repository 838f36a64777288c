"""doctor tells the truth about this environment, and its exit status tells it to scripts."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from verl_m2po.cli import doctor

pytestmark = pytest.mark.ray


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "verl_m2po", "doctor", *arguments],
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_all_is_well_here_and_in_a_ray_worker():
    done = run_doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything is in place" in done.stdout
    rows = [line for line in done.stdout.splitlines() if "verl_m2po." in line]
    assert rows
    assert all("yes" in line for line in rows), "each row must be there in the Ray worker too"


def test_a_plugin_that_verl_was_told_not_to_load():
    done = run_doctor("--no-ray-worker", VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.returncode == 1
    assert "VERL_USE_EXTERNAL_PLUGINS=none keeps verl from loading this plugin" in done.stdout


def test_missing_packages_are_named_with_a_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda package: None if package == "vllm" else "0.9.1")
    (problem,) = doctor.version_problems()
    assert problem.startswith("vllm is not installed. Remedy:")


def test_an_unsupported_verl_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda package: "0.8.0")
    (problem,) = doctor.version_problems()
    assert problem == "verl 0.8.0 is not supported. Remedy: pip install 'verl>=0.9,<0.10'."


def test_versions_outside_the_tested_are_marked(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda package: "99")
    output = io.StringIO()
    Console(file=output, width=120).print(doctor._versions_table())
    assert output.getvalue().count("not among the tested") == len(doctor.TESTED_VERSIONS)


def test_both_names_of_vllm_are_known():
    assert doctor.installed_version("vllm")
    assert doctor.installed_version("no-such-package") is None
