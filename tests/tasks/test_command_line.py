"""``python -m verl_m2po.tasks``: what it prints, where, and with which exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from verl_m2po.tasks import parquet, prepare
from verl_m2po.tasks.__main__ import app


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_arithmetic_prints_the_paths(tmp_path: Path) -> None:
    result = run("arithmetic", "--out", tmp_path, "--rows", 20, "--validation-rows", 5, "--digits", 3, "--seed", 1)
    assert result.exit_code == 0, result.stderr
    paths = [Path(line) for line in result.stdout.split()]
    assert [parquet.check(path) for path in paths] == [20, 5]


def test_column_addition_prints_the_paths(tmp_path: Path) -> None:
    result = run("column-addition", "--out", tmp_path, "--rows", 7, "--validation-rows", 3, "--digits", 4)
    assert result.exit_code == 0, result.stderr
    assert [parquet.check(Path(line)) for line in result.stdout.split()] == [7, 3]


def test_tiny_model_prints_the_folder(tmp_path: Path) -> None:
    arguments = ("tiny-model", "--cache", tmp_path / "cache", "--target-accuracy", 1e-9)
    first, second = run(*arguments), run(*arguments, "--out", tmp_path / "model")
    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr + second.stderr
    assert (Path(first.stdout.strip()) / "model.safetensors").is_file()
    assert Path(second.stdout.strip()) == tmp_path / "model"


def write_aime(path: Path, *answers: str) -> Path:
    path.write_text("".join(f'{{"problem": "Which one?", "answer": "{answer}"}}\n' for answer in answers))
    return path


@pytest.mark.parametrize(("strict", "exit_code"), [((), 0), (("--strict",), 1)])
def test_prepare_lists_what_it_leaves_out(tmp_path: Path, strict: tuple[str, ...], exit_code: int) -> None:
    source = write_aime(tmp_path / "test.jsonl", "7", "seven")
    result = run("prepare", "aime24", "--out", tmp_path / "out", "--source", source, *strict)
    assert result.exit_code == exit_code
    assert Path(result.stdout.strip()) == tmp_path / "out" / "test.parquet"
    shown = " ".join(result.stderr.split())
    for part in ("AIME 2024", "Rows of test that cannot be used", "'seven'", "Which one?", "test.unusable.jsonl"):
        assert part in shown


def test_prepare_fails_if_nothing_is_left(tmp_path: Path) -> None:
    source = write_aime(tmp_path / "test.jsonl", "seven")
    result = run("prepare", "aime24", "--out", tmp_path / "out", "--source", source)
    assert result.exit_code == 1
    assert "no row of AIME 2024 can be used" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prepare", "gsm8", "--out", "{tmp}"), "Did you mean 'gsm8k'?"),
        (("prepare", "gsm8k", "--out", "{tmp}", "--source", "{tmp}/none"), "does not exist"),
        (("prepare", "aime24", "--out", "{tmp}/file", "--source", "{tmp}/test.jsonl"), "cannot write to"),
        (("arithmetic", "--out", "{tmp}", "--digits", "0"), "digits=0"),
        (("arithmetic", "--out", "{tmp}/file"), "cannot write to"),
        (("tiny-model", "--target-accuracy", "1"), "target_accuracy=1.0"),
        (("tiny-model", "--task", "subtraction"), "task='subtraction'"),
        (("tiny-model", "--target-accuracy", "1e-9", "--cache", "{tmp}/file"), "cannot write to"),
    ],
)
def test_a_mistake_is_one_line_and_a_status(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "file").write_text("")
    write_aime(tmp_path / "test.jsonl", "7")
    result = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_without_a_network_it_says_what_to_pass(tmp_path: Path) -> None:
    # A process of its own: huggingface_hub reads the variable when it is imported.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "COLUMNS": "200"}
    command = [sys.executable, "-m", "verl_m2po.tasks", "prepare", "amc23", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 1
    assert "math-ai/amc23 could not be fetched from the hub" in result.stderr
    assert "pass it with --source FILE" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_help_names_every_set() -> None:
    shown = " ".join(run("prepare", "--help").stdout.replace("│", " ").split())
    for name in prepare.DATA_SETS:
        assert name in shown
