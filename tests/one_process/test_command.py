"""Where the experiment bench puts its runs."""

import pytest

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
