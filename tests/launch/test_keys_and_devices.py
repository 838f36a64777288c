"""A key that Hydra's `+` made up, and GPUs that are not there, are refused with the name of the right one."""

import re
from pathlib import Path

import composing
import pytest
import torch
from compose import verl_hydra
from hydra import compose
from omegaconf import OmegaConf

from verl_m2po.launch import callback
from verl_m2po.launch.checks import devices, keys


def verl_scripts_add() -> set[str]:
    """The keys that verl's own example scripts add with a `+`."""
    text = (Path(__file__).parents[1] / "config" / "verl_example_overrides.yaml").read_text()
    return set(re.findall(r"^ +(\+[\w.+]+):", text, re.MULTILINE))


@pytest.fixture
def run_config():
    """Composes verl's config as a job sees it, Hydra's own node included."""

    def make(*overrides: str):
        with verl_hydra():
            return compose("ppo_trainer", overrides=list(overrides), return_hydra_config=True)

    return make


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("algorithm.policy_los", "algorithm.policy_loss"),
        ("actor_rollout_ref.actor.policy_loss.m2po.treshold", "actor_rollout_ref.actor.policy_loss.m2po.threshold"),
        ("trainer.v1.stale_k.stalenes_updates", "trainer.v1.stale_k.staleness_updates"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_right_one(run_config, wrong, right):
    (problem,) = keys.problems(run_config(f"+{wrong}=1"))
    assert f"+{wrong}=1" in str(problem) and f"Set {right}" in str(problem)


def test_where_hydra_refuses_the_key_the_right_one_is_named_beside_it():
    command = ["--config-name=arithmetic", "-m", "algorithm.policy_los=m2po", "trainer.v1.stale_k.staleness_update=8"]
    assert list(keys.hints(command)) == [
        "There is no setting algorithm.policy_los. Did you mean algorithm.policy_loss?",
        "There is no setting trainer.v1.stale_k.staleness_update. Did you mean trainer.v1.stale_k.staleness_updates?",
    ]


def test_right_keys_groups_and_keys_of_verls_get_no_hint():
    command = ["loss=m2po", "algorithm.policy_loss=m2po", "algorithm.adv_estimator=grpo", "data.train_batch_size=8"]
    assert list(keys.hints([*command, "+algorithm.policy_los=m2po", "/some/file"])) == []


def test_no_key_of_verls_is_taken_for_a_misspelling(run_config):
    leaves = [key for key, _ in composing.leaves(run_config()) if not key.startswith("hydra.")]
    assert len(leaves) > 300
    assert list(keys.hints(f"{key}=1" for key in leaves)) == []
    added = [key for key in verl_scripts_add() if key.startswith("+")]
    assert len(added) > 20
    assert [key for key in added if keys.nearest(key.lstrip("+"))] == []


def test_a_misspelt_key_is_refused_even_where_nothing_else_of_ours_is_used(run_config):
    with pytest.raises(SystemExit, match=r"algorithm\.policy_loss"):
        callback.PreflightCallback().on_job_start(run_config("+algorithm.policy_los=m2po"))


@pytest.mark.parametrize(
    "key", ["actor_rollout_ref.actor.megatron.anything", "algorithm.gdpo_reward_keys", "trainer.use_legacy_worker_impl"]
)
def test_keys_that_verls_scripts_add_are_left_alone(run_config, key):
    assert not list(keys.problems(run_config(f"+{key}=1")))


@pytest.fixture
def no_cluster(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


def config(**changes):
    base = OmegaConf.create(
        {
            "trainer": {"device": "cuda", "nnodes": 1, "n_gpus_per_node": 8},
            "actor_rollout_ref": {"rollout": {"nnodes": 0, "n_gpus_per_node": 8}},
            "ray_kwargs": {"ray_init": {}},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(base, key.replace("__", "."), value, force_add=True)
    return base


@pytest.mark.parametrize(
    ("gpus", "changes", "refused"),
    [
        (0, {}, "this machine has none"),
        (8, {}, None),
        (1, {}, "this machine has 1"),
        (8, {"actor_rollout_ref__rollout__nnodes": 1}, "need 16 GPUs"),
        (0, {"trainer__device": "cpu"}, None),
        (0, {"ray_kwargs__ray_init__address": "10.0.0.1:6379"}, None),
    ],
)
def test_gpus_are_counted_where_ray_will_look_for_them(no_cluster, monkeypatch, gpus, changes, refused):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    found = [str(problem) for problem in devices.problems(config(**changes))]
    assert not found if refused is None else refused in found[0]


def test_a_cluster_that_is_running_may_have_them(no_cluster, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379")
    assert not list(devices.problems(config()))
