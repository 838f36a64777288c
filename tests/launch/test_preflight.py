"""Each thing that can be known to be wrong is refused before anything starts, in one message with the remedy."""

import os
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from compose import composed

from verl_m2po.ground.check import ask_all
from verl_m2po.ground.problem import Problem
from verl_m2po.launch import callback, registry
from verl_m2po.launch.checks import data, losses, machine, model

LOSS = "actor_rollout_ref.actor.policy_loss.m2po"


@pytest.fixture
def config(tiny: Path, addition: Path):
    """Composes a run with which nothing is wrong, and then `overrides`."""

    def make(*overrides: str):
        return composed(
            "hardware=cpu",
            f"actor_rollout_ref.model.path={tiny}",
            f"data.train_files={addition / 'train.parquet'}",
            f"data.val_files={addition / 'validation.parquet'}",
            *overrides,
        )

    return make


def inputs(config) -> list[Problem]:
    """What is wrong with the model and the data."""
    asked = [
        check for check in registry.of_the_machine() if check.about in (model.PATH.key, data.TRAIN, data.VALIDATION)
    ]
    return ask_all(asked, config)


def one(problems) -> str:
    (problem,) = problems
    return str(problem)


def test_a_good_run_passes(config):
    assert list(losses.problems(config())) == []
    assert list(inputs(config())) == []


def test_unknown_loss_names_the_nearest(config):
    message = one(losses.problems(config("algorithm.policy_loss=m2pp")))
    assert "algorithm.policy_loss=m2pp" in message
    assert "Did you mean 'm2po'?" in message


@pytest.mark.parametrize("value", ["-0.1", "0", "nan", "abc", "true"])
def test_bad_threshold_names_the_key(config, value):
    message = one(losses.problems(config(f"{LOSS}.threshold={value}")))
    assert f"{LOSS}.threshold" in message
    assert value.lower() in message.lower()


@pytest.mark.parametrize("value", ["inf", "1e400"])
def test_an_infinite_threshold_is_asked_for(config, value):
    (problem,) = losses.problems(config(f"{LOSS}.threshold={value}"))
    assert not problem.is_fatal and "no_trust_region" in str(problem)


@pytest.mark.parametrize("mode", ["colocate_async", "separate_async"])
def test_missing_behaviour_log_probs(config, mode):
    overrides = (f"trainer.v1.trainer_mode={mode}", "actor_rollout_ref.rollout.calculate_log_probs=false")
    message = one(losses.problems(config(*overrides)))
    assert "actor_rollout_ref.rollout.calculate_log_probs=False" in message
    assert "Set actor_rollout_ref.rollout.calculate_log_probs=true" in message


def test_a_mismatch_floor_needs_a_mode_that_knows_ages(config):
    message = one(losses.problems(config(f"{LOSS}.subtract_mismatch_floor=true")))
    assert f"{LOSS}.subtract_mismatch_floor=True" in message and "gives no ages" in message
    assert list(losses.problems(config(f"{LOSS}.subtract_mismatch_floor=true", "staleness=s64"))) == []


def test_hidden_staleness_is_refused_in_async_modes_only(config):
    bypass_off = "algorithm.rollout_correction.bypass_mode=false"
    assert list(losses.problems(config(bypass_off))) == []
    message = one(losses.problems(config(bypass_off, "trainer.v1.trainer_mode=colocate_async")))
    assert "age of the data disappears" in message
    assert "bypass_mode=true" in message


def test_missing_model(config):
    message = one(inputs(config("actor_rollout_ref.model.path=/no/such/model")))
    assert "actor_rollout_ref.model.path=/no/such/model: there is no such folder" in message


def test_folder_that_is_no_model(config, tmp_path):
    assert "no config.json" in one(inputs(config(f"actor_rollout_ref.model.path={tmp_path}")))


def test_lengths_that_the_model_does_not_have(config):
    message = one(inputs(config("data.max_prompt_length=4096", "data.max_response_length=8")))
    assert message.startswith("data.max_prompt_length + data.max_response_length=4104: the model has 4096 positions")


def test_positions_that_the_config_overrides_count(config):
    override = "+actor_rollout_ref.model.override_config.max_position_embeddings"
    assert list(inputs(config("data.max_response_length=30000", f"{override}=32768"))) == []
    message = one(inputs(config(f"{override}=4")))
    assert "4 positions (max_position_embeddings in actor_rollout_ref.model.override_config)" in message


@pytest.mark.parametrize(
    "override",
    [
        "actor_rollout_ref.actor.policy_loss.loss_mode=m2po",
        "algorithm.adv_estimator=oapl",
        "actor_rollout_ref.actor.policy_loss.opsm.delta=0.1",
    ],
)
def test_a_method_chosen_by_verls_own_key_is_checked_too(override):
    plain = ["trainer.v1.trainer_mode=colocate_async", "algorithm.rollout_correction.bypass_mode=false"]
    plain += ["trainer.device=cuda", "algorithm.policy_loss=null"]
    assert not callback.uses_this_package(composed(*plain, config_name="ppo_trainer"))
    chosen = composed(*plain, override, config_name="ppo_trainer")
    assert callback.uses_this_package(chosen)
    assert list(losses.problems(chosen))


def test_another_actor_worker_under_mini_batch_scope(config, monkeypatch):
    from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

    monkeypatch.setattr(ActorRolloutRefWorker, "actor_worker_cls", TrainingWorker)
    message = one(losses.problems(config()))
    assert f"{LOSS}.scope=mini_batch cannot be honoured: the actor worker is" in message
    assert list(losses.problems(config(f"{LOSS}.scope=micro_batch"))) == []


def test_hub_model_offline(config, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in one(inputs(config("actor_rollout_ref.model.path=nobody/nothing")))


def test_missing_data(config, tmp_path):
    message = one(inputs(config(f"data.train_files={tmp_path / 'none.parquet'}")))
    assert message.startswith(f"data.train_files={tmp_path / 'none.parquet'}: there is no such file")


def test_a_path_that_verl_would_take_for_a_pattern(config, tmp_path):
    path = tmp_path / "a[b].parquet"
    pd.DataFrame({"prompt": [[]] * 64}).to_parquet(path)
    message = one(inputs(config(f"data.train_files='{path}'")))
    assert message.startswith(f"data.train_files={path}: verl reads it with `datasets`, to which *, ? and [ in a path")


def test_a_pattern_is_all_the_files_that_it_matches(config, tmp_path):
    rows = {name: ["x"] * 40 for name in ("prompt", "data_source", "reward_model")}
    for folder in ("a", "b", "c[d]"):
        (tmp_path / folder).mkdir()
        pd.DataFrame(rows).to_parquet(tmp_path / folder / "part.parquet")
    matched = config(f"data.train_files={tmp_path}/*/part.parquet")
    assert not any("data.train_files" in str(problem) for problem in inputs(matched))
    assert data.known_rows(matched, data.TRAIN) == 120
    assert "there is no such file" in one(inputs(config(f"data.train_files={tmp_path}/*.parquet")))
    assert list(inputs(config("data.train_files=hdfs://somewhere/*.parquet"))) == []


def test_a_file_that_stands_several_times_is_one_problem(config):
    four = ",".join(["/no/such.parquet"] * 4)
    assert "there is no such file" in one(inputs(config(f"data.val_files=[{four}]")))


def test_data_without_the_needed_columns(config, tmp_path):
    pd.DataFrame({"question": ["1+1"] * 64}).to_parquet(tmp_path / "q.parquet")
    message = one(inputs(config(f"data.train_files={tmp_path / 'q.parquet'}")))
    assert "lacks the column(s) prompt, data_source, reward_model; it has question" in message


def test_data_that_is_not_parquet(config, tmp_path):
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    assert "not valid parquet" in one(inputs(config(f"data.train_files={tmp_path / 'cut.parquet'}")))


@pytest.fixture
def healthy_machine(monkeypatch):
    """A machine on which nothing is wrong, whatever the one is that the tests run on."""
    memory = namedtuple("memory", "available total")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(16 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda temp_dir: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_good_machine_passes(config, healthy_machine):
    assert list(machine.problems(config())) == []


def test_too_little_memory(config, healthy_machine, monkeypatch):
    memory = namedtuple("memory", "available total")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(3 * 2**30, 24 * 2**30))
    assert one(machine.problems(config())).startswith("available memory=3.0 GiB: a CPU run needs 8 GiB")


def test_gpu_under_hardware_cpu(config, healthy_machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    message = one(machine.problems(config()))
    assert message.startswith("hardware=cpu: this machine has a GPU (Some GPU)")
    assert "hardware=one_gpu" in message


def test_no_free_port(config, healthy_machine, monkeypatch):
    def refuse(address):
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert "free ports on 127.0.0.1=0" in one(machine.problems(config()))


def test_vllm_not_installed(config, healthy_machine, monkeypatch):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert "vLLM is not installed" in one(machine.problems(config()))


def test_an_executor_of_one_worker_for_two(config, healthy_machine):
    two = "actor_rollout_ref.rollout.tensor_model_parallel_size=2"
    key = "actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend"
    message = one(machine.problems(config(two)))
    assert message.startswith(f"{key}=uni: it runs one worker") and message.endswith(f"Set {key}=mp.")
    assert list(machine.problems(config(two, f"{key}=mp"))) == []


def test_ray_cluster_left_behind(config, healthy_machine, monkeypatch):
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda temp_dir: "10.0.0.1:6379")
    message = one(machine.problems(config()))
    assert "10.0.0.1:6379" in message
    assert "ray stop" in message
    assert list(machine.problems(config("ray_kwargs.ray_init.address=local"))) == []


def test_other_hardware_is_not_asked(healthy_machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert list(machine.problems(composed(config_name="ppo_trainer"))) == []


def test_runs_without_us_are_none_of_our_business():
    assert not callback.uses_this_package(composed(config_name="ppo_trainer"))
    assert callback.uses_this_package(composed("algorithm.policy_loss=m2po", config_name="ppo_trainer"))


def test_message_of_a_problem():
    assert str(Problem("a.b", 3, "it is odd", "Set a.b=2")) == "a.b=3: it is odd. Set a.b=2."


def test_main_refuses_in_one_message_without_a_traceback(tmp_path):
    """Through verl's own entry point: every problem at once, exit status 1, nothing started."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "verl.trainer.main_ppo", "--config-name=arithmetic", "hardware=cpu"),
            *("actor_rollout_ref.model.path=/no/such/model", f"{LOSS}.threshold=-1"),
            "data.train_files=/no/such.parquet",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HYDRA_FULL_ERROR": "1"},
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "verl-m2po refuses this run:" in done.stderr
    for key in (
        "actor_rollout_ref.model.path=/no/such/model",
        f"{LOSS}.threshold",
        "data.train_files=/no/such.parquet",
    ):
        assert key in done.stderr


def test_main_names_the_key_that_was_meant(tmp_path):
    """Hydra's own message suggests a `+`, with which nothing would read the key."""
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", "algorithm.policy_los=m2po"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "Did you mean algorithm.policy_loss?" in done.stderr
    assert "Could not override 'algorithm.policy_los'" in done.stderr
