"""Who may go on from which checkpoint, and with what words the others are refused."""

import json
import random

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from verl_m2po.staleness.restart import random_states, resume
from verl_m2po.staleness.restart.checkpoint import CheckpointError, Checkpoints
from verl_m2po.staleness.restart.persistence import Persistence


def config(root, mode: str = "stale_k", **changes):
    """What resuming reads of a configuration, with changes given as `a__b=value`."""
    base = OmegaConf.create(
        {
            "data": {"train_batch_size": 8, "train_files": "train.parquet", "seed": 1},
            "algorithm": {"adv_estimator": "grpo", "use_kl_in_reward": False},
            "actor_rollout_ref": {
                "actor": {
                    "ppo_mini_batch_size": 4,
                    "ppo_epochs": 1,
                    "strategy": "fsdp2",
                    "policy_loss": {"loss_mode": "m2po", "m2po": {"threshold": 0.04}},
                    "optim": {"lr": 1e-3, "total_training_steps": -1},
                },
                "rollout": {"n": 4, "temperature": 1.0},
            },
            "trainer": {
                "v1": {"trainer_mode": mode, mode: {"staleness_updates": 4}},
                "default_local_dir": str(root),
                "resume_mode": "auto",
                "resume_from_path": None,
                "max_actor_ckpt_to_keep": 2,
                "nnodes": 1,
                "n_gpus_per_node": 1,
            },
        }
    )
    for key, value in changes.items():
        OmegaConf.update(base, key.replace("__", "."), value, force_add=True)
    return base


def write(root, step: int = 4, ranks: int = 1, **state) -> None:
    """A checkpoint of `config(root)`."""
    state = {"state_version": 2, "settings": resume.settings_of(config(root))} | state
    with Checkpoints(root).writing(step) as incomplete:
        folder = incomplete / f"global_step_{step}"
        (folder / "actor").mkdir()
        for rank in range(ranks):
            (folder / "actor" / f"model_world_size_{ranks}_rank_{rank}.pt").write_text("weights")
        (folder / resume.STATE_FILE).write_text(json.dumps(state))


def the_problem(config):
    (problem,) = resume.problems(config)
    return problem


def test_the_same_run_goes_on(tmp_path):
    assert resume.problems(config(tmp_path)) == []
    write(tmp_path)
    assert resume.problems(config(tmp_path)) == []
    assert resume.find(config(tmp_path).trainer) == tmp_path / "global_step_4"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"trainer__v1__stale_k__staleness_updates": 8},
            "trainer.v1.stale_k.staleness_updates=8: global_step_4 was written with 4: its buffered rollouts have the "
            "ages of the old schedule. Resume with trainer.v1.stale_k.staleness_updates=4, or start a new run",
        ),
        ({"data__train_batch_size": 16}, "data.train_batch_size=16: global_step_4 was written with 8"),
        (
            {"actor_rollout_ref__actor__ppo_mini_batch_size": 8},
            "ppo_mini_batch_size=8: global_step_4 was written with 4: it counts ages in optimizer updates of another",
        ),
        ({"actor_rollout_ref__rollout__n": 8}, "rollout.n=8: global_step_4 was written with 4"),
        ({"actor_rollout_ref__actor__strategy": "fsdp"}, "strategy=fsdp: global_step_4 was written with 'fsdp2'"),
        (
            {"trainer__v1__trainer_mode": "sync"},
            "trainer_mode=sync: global_step_4 was written with 'stale_k': the modes count batches",
        ),
        (
            {"trainer__n_gpus_per_node": 2},
            "trainer.nnodes x trainer.n_gpus_per_node=2: global_step_4 holds shards for 1 rank(s), and verl loads an "
            "FSDP checkpoint on as many ranks only. Resume on 1 rank(s), or merge the shards",
        ),
    ],
)
def test_another_schedule_engine_or_number_of_ranks_is_refused(tmp_path, changes, words):
    write(tmp_path)
    problem = the_problem(config(tmp_path, **changes))
    assert problem.is_fatal and words in str(problem)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"actor_rollout_ref__actor__policy_loss__m2po__threshold": 0.1},
            "policy_loss.m2po.threshold=0.1: global_step_4 was written with 0.04; the run goes on with the new value",
        ),
        ({"actor_rollout_ref__actor__policy_loss__loss_mode": "vanilla"}, "loss_mode=vanilla"),
        ({"actor_rollout_ref__actor__optim__lr": 1e-4}, "optim.lr=0.0001: global_step_4 was written with 0.001"),
        ({"data__train_files": ["other.parquet"]}, "data.train_files=['other.parquet']"),
    ],
)
def test_another_threshold_or_loss_goes_on_and_says_so(tmp_path, changes, words):
    write(tmp_path)
    problem = the_problem(config(tmp_path, **changes))
    assert not problem.is_fatal and words in str(problem)


def test_what_verl_fills_in_at_the_start_is_no_setting(tmp_path):
    write(tmp_path)
    assert not resume.problems(config(tmp_path, actor_rollout_ref__actor__optim__total_training_steps=100))


def test_checkpoints_of_other_versions_of_this_package(tmp_path, caplog):
    old, newer, foreign = (tmp_path / name / "global_step_4" for name in ("old", "newer", "foreign"))
    for folder, state in ((old, {"state_version": 1, "version": 4, "rule": {}}), (newer, {"state_version": 3})):
        folder.mkdir(parents=True)
        (folder / resume.STATE_FILE).write_text(json.dumps(state))
    foreign.mkdir(parents=True)
    assert resume.read_state(old)["state_version"] == 1 and "an older verl-m2po wrote it" in caplog.text
    settings = resume.settings_of(config(tmp_path))
    assert resume.check(old, resume.read_state(old), settings, ranks=1) == []
    (problem,) = resume.check(newer, {"state_version": 3}, settings, ranks=1)
    assert problem.is_fatal and "has format 3, this version of verl-m2po reads 1 to 2" in str(problem)
    with pytest.raises(FileNotFoundError, match="was not written by a trainer mode of verl-m2po"):
        resume.read_state(foreign)


def test_a_broken_state_file_is_named_before_it_is_parsed(tmp_path):
    write(tmp_path)
    path = tmp_path / "global_step_4" / resume.STATE_FILE
    path.write_text(path.read_text()[:-9])
    assert resume.problems(config(tmp_path)) == []
    with pytest.raises(CheckpointError, match=r"staleness.json has \d+ bytes"):
        resume.read_state(tmp_path / "global_step_4")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainer__resume_mode": "resume_path"}, "resume_from_path=None: not a checkpoint folder"),
        ({"trainer__resume_mode": "resume_path", "trainer__resume_from_path": "/nowhere/global_step_4"}, "/nowhere"),
        (
            {"trainer__resume_mode": "resume_path", "trainer__resume_from_path": 3},
            "resume_from_path=3: not",
        ),
        ({"trainer__resume_mode": "latest"}, "resume_mode=latest: it is one of auto, disable, resume_path"),
    ],
)
def test_nothing_to_resume_from_is_refused(tmp_path, changes, words):
    assert words in str(the_problem(config(tmp_path, **changes)))


def test_shards_on_other_machines_are_noticed_when_they_are_written(tmp_path):
    (tmp_path / "actor").mkdir()
    (tmp_path / "actor" / "model_world_size_3_rank_1.pt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"rank_0.pt, model_world_size_3_rank_2.pt .* all nodes share"):
        resume.require_all_shards(tmp_path)


def test_random_states_go_through_json():
    state = json.loads(json.dumps(random_states.save()))
    drawn = (random.random(), np.random.rand(), torch.rand(()).item())
    random_states.load(state)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == drawn


@pytest.mark.parametrize("mode", ["replay", "bounded_async"])
@pytest.mark.parametrize(("key", "value"), [("max_uses", 1), ("fresh_share", 1.0), ("sampling", "newest")])
def test_a_checkpoint_with_replay_is_refused_without_it_or_with_another(tmp_path, mode, key, value):
    replay = {"max_uses": 4, "fresh_share": 0.25, "sampling": "uniform"}
    section = {f"trainer__v1__{mode}__replay": replay}
    write(tmp_path, settings=resume.settings_of(config(tmp_path, mode, **section)))
    assert resume.problems(config(tmp_path, mode, **section)) == []
    problem = the_problem(config(tmp_path, mode, **{f"trainer__v1__{mode}__replay": replay | {key: value}}))
    assert problem.is_fatal and problem.key == f"trainer.v1.{mode}.replay.{key}"
    assert f"Resume with trainer.v1.{mode}.replay.{key}={replay[key]}" in problem.remedy


AFTER = "trainer.v1.replay.reference.reincarnate_after_steps"


@pytest.mark.parametrize(("old", "new"), [(2, None), (2, 8), (2, 3), (None, 2), (8, 2)])
def test_a_reference_that_has_become_another_cannot_be_taken_back(tmp_path, old, new):
    asked = {
        after: config(tmp_path, "replay", trainer__v1__replay__reference={"reincarnate_after_steps": after})
        for after in (old, new)
    }
    write(tmp_path, settings=resume.settings_of(asked[old]))
    assert resume.problems(asked[old]) == []
    problem = the_problem(asked[new])
    assert problem.is_fatal and problem.key == AFTER and f"written with {old}" in problem.why
    assert f"Resume with {AFTER}={'null' if old is None else old}," in problem.remedy


@pytest.mark.parametrize(("old", "new"), [(4, None), (None, 4), (5, 8)])
def test_a_reference_that_is_still_to_become_another_may_do_so_at_another_time(tmp_path, old, new):
    asked = {
        after: config(tmp_path, "replay", trainer__v1__replay__reference={"reincarnate_after_steps": after})
        for after in (old, new)
    }
    write(tmp_path, settings=resume.settings_of(asked[old]))
    problem = the_problem(asked[new])
    assert not problem.is_fatal and problem.key == AFTER


@pytest.mark.parametrize("end", ["", "/", "//"])
def test_a_path_with_a_trailing_slash_is_the_same_checkpoint(tmp_path, end):
    write(tmp_path)
    path = f"{tmp_path / 'global_step_4'}{end}"
    asked = config(tmp_path, trainer__resume_mode="resume_path", trainer__resume_from_path=path, trainer__save_freq=-1)
    assert resume.find(asked.trainer) == tmp_path / "global_step_4" and resume.problems(asked) == []
    Persistence.open(asked)
    assert asked.trainer.resume_from_path.split("global_step_")[-1] == "4", "what verl takes for the step"


def test_of_verls_own_modes_verl_takes_the_slash_for_a_part_of_the_step(tmp_path):
    (tmp_path / "global_step_4").mkdir()
    slash = {"trainer__resume_mode": "resume_path", "trainer__resume_from_path": f"{tmp_path}/global_step_4/"}
    assert "Remove the last slash" in str(the_problem(config(tmp_path, "sync", **slash)))
