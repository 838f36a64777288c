"""The overlay adds keys to verl's primary configs and changes no value, wherever the config comes from."""

import subprocess
import sys
from importlib import resources

import pytest
from composing import ADDED, REPLACED, additions, all_composed, changes, composed, leaves, options
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from verl_m2po.config.hydra import PRIMARY_CONFIGS

pytestmark = pytest.mark.slow


def test_it_adds_keys_and_changes_no_value():
    requests = [(name, [], None) for name in PRIMARY_CONFIGS] + [("ppo_trainer", ["model_engine=veomni"], None)]
    without, with_plugin = (all_composed(requests, plugin=plugin) for plugin in (False, True))
    for request, before, after in zip(requests, without, with_plugin, strict=True):
        assert isinstance(before, dict) and isinstance(after, dict), (request, before, after)
        assert changes(before, after) == REPLACED, request
        assert additions(before, after) == ADDED, request


def test_every_added_setting_can_be_set_without_a_plus():
    config = composed("ppo_trainer")
    added = {key: value for key, value in leaves(config) if key in ADDED and "$" not in str(value)}
    assert "trainer.v1.stale_k.staleness_updates" in added
    overrides = [f"{key}={'null' if value is None else value}" for key, value in added.items()]
    assert composed("ppo_trainer", *overrides) == config


def test_a_config_in_another_directory_that_lists_verls_inherits_it(tmp_path):
    """As recipes do: their own directory, and verl's as a search path."""
    (tmp_path / "mine.yaml").write_text(
        "hydra:\n  searchpath: [pkg://verl.trainer.config]\n"
        "defaults: [ppo_trainer, _self_]\n"
        "trainer:\n  project_name: mine\n"
    )
    with initialize_config_dir(str(tmp_path), version_base=None):
        config = compose("mine", overrides=["algorithm.policy_loss=m2po", "staleness=s64"])
    assert (config.algorithm.policy_loss, config.trainer.project_name) == ("m2po", "mine")
    assert config.trainer.v1.stale_k.staleness_updates == 64


def test_verls_configs_as_a_directory_are_verls():
    """``python -m verl.trainer.main_ppo`` names the directory of verl's configs and not their module."""
    with initialize_config_dir(str(resources.files("verl.trainer") / "config"), version_base=None):
        config = compose("ppo_trainer", overrides=["model=tiny"])
    assert config == composed("ppo_trainer", "model=tiny")


def test_a_config_of_the_users_with_the_name_of_one_of_verls_stays_the_users(tmp_path):
    (tmp_path / "ppo_trainer.yaml").write_text("trainer: {project_name: mine}\nalgorithm: {}\n")
    with initialize_config_dir(str(tmp_path), version_base=None):
        config = compose("ppo_trainer")
    assert config.trainer.project_name == "mine"
    assert "data" not in config


def test_a_group_of_the_users_with_the_name_of_one_of_ours_stays_the_users(tmp_path):
    (tmp_path / "hardware").mkdir()
    (tmp_path / "hardware" / "rack.yaml").write_text("# @package _global_\ntrainer: {n_gpus_per_node: 72}\n")
    (tmp_path / "mine.yaml").write_text(
        "hydra: {searchpath: ['pkg://verl.trainer.config']}\ndefaults: [ppo_trainer, hardware: rack, _self_]\n"
    )
    with initialize_config_dir(str(tmp_path), version_base=None):
        assert compose("mine").trainer.n_gpus_per_node == 72


def test_an_option_that_does_not_exist_is_answered_with_those_that_do():
    with pytest.raises(HydraException, match="loss/m3po") as error:
        composed("ppo_trainer", "loss=m3po")
    assert all(option in str(error.value) for option in options("loss"))


def test_a_misspelt_key_is_named():
    with pytest.raises(HydraException, match=r"algorithm\.policy_los"):
        composed("ppo_trainer", "algorithm.policy_los=m2po")


# A sweep, and a directory added with --config-dir, need Hydra's command line; the task itself is not run.
_APP = """
import sys
import hydra, verl

# What the preflight would ask of the machine is not the question here.
callbacks = "hydra.callbacks.verl_m2po._target_=hydra.experimental.callback.Callback"

@hydra.main(config_path="pkg://verl.trainer.config", config_name="ppo_trainer", version_base=None)
def main(config):
    v1 = config.trainer.v1
    age = v1.stale_k.staleness_updates
    print("JOB", config.algorithm.policy_loss, v1.trainer_mode, age, config.trainer.project_name)

sys.argv.append(callbacks)
main()
"""


def hydra_app(*arguments: str, cwd) -> list[str]:
    process = subprocess.run(
        [sys.executable, "-c", _APP, *arguments, "hydra/job_logging=none", "hydra/hydra_logging=none"],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return [line.removeprefix("JOB ") for line in process.stdout.splitlines() if line.startswith("JOB ")]


def test_a_sweep_runs_every_combination_in_a_directory_of_the_users(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text(
        "defaults: [ppo_trainer, _self_]\ntrainer: {project_name: mine, device: none}\n"
    )
    jobs = hydra_app(
        "--config-dir=conf",
        "--config-name=mine",
        "-m",
        # What `loss=grpo,m2po` says, as a pattern over the options of a group of ours.
        "loss=glob([grpo,m2po])",
        "staleness=on_policy,s64,s256",
        cwd=tmp_path,
    )
    ages = [("sync", 0), ("stale_k", 64), ("stale_k", 256)]
    assert jobs == [f"{loss} {mode} {age} mine" for loss in ("vanilla", "m2po") for mode, age in ages]
