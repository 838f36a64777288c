"""Where the experiment bench puts its runs."""

import pytest
from typer.testing import CliRunner

from verl_m2po.cli.main import app
from verl_m2po.one_process.command import _folder_name

DEFAULT = "m2po_stale_k_s256"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["loss=m2po", "staleness=s256", "trainer.total_training_steps=9"], DEFAULT),
        (["data.seed=2", "actor_rollout_ref.actor.optim.lr=6e-5"], f"{DEFAULT}-data.seed=2-optim.lr=6e-5"),
        (["+actor_rollout_ref.actor.optim.betas=[0.9, 0.99]"], f"{DEFAULT}-optim.betas=_0.9_0.99_"),
        (["actor_rollout_ref.model.path=/a/../model"], f"{DEFAULT}-model.path=_a_.._model"),
        (["actor_rollout_ref.rollout.seed=2"], f"{DEFAULT}-rollout.seed=2"),
        (["trainer.experiment_name=mine", "data.seed=2"], "mine"),
    ],
)
def test_runs_of_other_settings_have_other_folders(overrides, name):
    assert _folder_name("mine" if name == "mine" else DEFAULT, overrides) == name


def test_long_names_stay_different():
    names = {_folder_name(DEFAULT, ["data.seed=1"] * 30 + [f"data.seed={seed}"]) for seed in (1, 2)}
    assert len(names) == 2 and max(map(len, names)) < 200


def tried(out, *arguments: str):
    overrides = ["staleness=on_policy", "trainer.total_training_steps=1"]
    return CliRunner().invoke(app, ["try", *overrides, *arguments, "--out", str(out)], env={"COLUMNS": "500"})


@pytest.mark.parametrize("path", ["/nowhere", "~/nowhere", "./nowhere"])
def test_a_model_that_is_not_there_is_refused_before_anything_is_replaced(tmp_path, path):
    result = tried(tmp_path, f"actor_rollout_ref.model.path='{path}'", "trainer.experiment_name=mine")
    assert result.exit_code == 2
    assert f"actor_rollout_ref.model.path={path}: there is no such folder" in result.output
    assert not (tmp_path / "mine").exists()


def test_more_digits_than_a_problem_can_have_are_refused_by_name(tmp_path):
    result = tried(tmp_path, "--digits", "65")
    assert result.exit_code == 2 and "--digits" in result.output and "not between 1 and 64" in result.output
