"""doctor tells the truth about this environment, and its exit status tells it to scripts."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import torch
import verl
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.trainer.ppo.v1.replay_buffer import ReplayBufferAsync

from verl_m2po.cli import constructions, doctor
from verl_m2po.plugin import EXTENSIONS

REPOSITORY = Path(__file__).parents[2]


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "verl_m2po", "doctor", *arguments],
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.mark.ray
def test_all_is_well_here_and_in_a_ray_worker():
    done = run_doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything is in place" in done.stdout
    rows = [line for line in done.stdout.splitlines() if "verl_m2po." in line]
    assert rows
    assert all("yes" in line for line in rows), "each row must be there in the Ray worker too"


@pytest.mark.slow
def test_a_plugin_that_verl_was_told_not_to_load():
    done = run_doctor("--no-ray-worker", VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.returncode == 1
    assert "VERL_USE_EXTERNAL_PLUGINS=none keeps verl from loading this plugin" in done.stdout


def test_missing_packages_are_named_with_a_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda package: None if package == "vllm" else "0.9.1")
    (problem,) = doctor.version_problems()
    assert problem.startswith("vllm is not installed. Remedy:")


@pytest.mark.parametrize("found", ["0.8.0", "0.9.0", "0.10.0"])
def test_an_unsupported_verl_is_named(monkeypatch, found):
    monkeypatch.setattr(verl, "__version__", found)
    problem = doctor.verl_problem()
    assert problem.startswith(f"verl {found}, imported from {Path(verl.__file__).parent}, is not supported")
    assert problem.endswith(f"Remedy: pip install 'verl{doctor.SUPPORTED_VERL}'.")


@pytest.mark.parametrize("found", ["0.9.1", "0.9.2", "0.9.2.dev1"])
def test_a_supported_verl_is_no_problem(monkeypatch, found):
    monkeypatch.setattr(verl, "__version__", found)
    assert doctor.verl_problem() is None


def test_what_is_supported_is_what_the_package_requires():
    requirements = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    (required,) = (Requirement(text) for text in requirements if text.startswith("verl"))
    assert required.specifier == SpecifierSet(doctor.SUPPORTED_VERL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("__version__ = '0.7.0'", "verl 0.7.0, imported from {folder}/verl, is not supported: verl"),
        ("raise KeyError('old')", "verl cannot be imported from {folder}/verl/__init__.py: KeyError: 'old'."),
    ],
)
def test_a_verl_that_hides_the_installed_one_is_the_one_problem(tmp_path, body, said):
    (tmp_path / "verl").mkdir()
    (tmp_path / "verl" / "__init__.py").write_text(body)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run_doctor("--no-ray-worker", PYTHONPATH=path)
    assert done.returncode == 1
    (problem,) = [line for line in done.stdout.splitlines() if line.startswith("problem:")]
    assert said.format(folder=tmp_path) in problem
    assert "it hides the installed verl 0.9.1; take it off PYTHONPATH" in problem


def test_what_is_registered_and_cannot_be_built_is_a_problem(monkeypatch):
    """As with verl 0.9.0, whose buffer took no threshold of None: every name was in its registry."""
    build = ReplayBufferAsync.__init__

    def as_in_0_9_0(self, *args, max_off_policy_threshold, **kwargs):
        assert isinstance(max_off_policy_threshold, int), f"Invalid threshold: {max_off_policy_threshold}"
        build(self, *args, max_off_policy_threshold=max_off_policy_threshold, **kwargs)

    (modes,) = [row for row in EXTENSIONS if row.what == "trainer mode"]
    assert not list(constructions.problems(modes))
    monkeypatch.setattr(ReplayBufferAsync, "__init__", as_in_0_9_0)
    problems = list(constructions.problems(modes))
    assert len(problems) == len(modes.names)
    assert all("cannot be built as a run does: AssertionError: Invalid threshold: None" in one for one in problems)


def test_a_loss_that_is_registered_and_cannot_be_called_is_a_problem(monkeypatch):
    (losses,) = [row for row in EXTENSIONS if row.what == "policy loss"]
    assert not list(constructions.problems(losses))
    monkeypatch.setitem(POLICY_LOSS_REGISTRY, "topr", lambda **_: (torch.zeros(()), {}))
    (problem,) = constructions.problems(losses)
    assert "'topr' is registered, but cannot be built as a run does: RuntimeError:" in problem


def test_versions_outside_the_tested_are_marked(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda package: "99")
    output = io.StringIO()
    Console(file=output, width=120).print(doctor._versions_table())
    assert output.getvalue().count("not among the tested") == len(doctor.TESTED_VERSIONS)


def test_both_names_of_vllm_are_known():
    assert doctor.installed_version("vllm")
    assert doctor.installed_version("no-such-package") is None
