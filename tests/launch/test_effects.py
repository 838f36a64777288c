"""What verl's trainer would not act on is said before the start, by the key."""

import functools
import json
import subprocess
import sys
import types

import pandas as pd
import pytest
from compose import composed, verl_hydra
from hydra import compose

from verl_m2po.ground.check import ask_all
from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import read
from verl_m2po.launch import callback, registry
from verl_m2po.launch.checks import data, effects, entry_point, images, inactive, losses, models, tools
from verl_m2po.staleness import checks
from verl_m2po.staleness.checks import memory

M2PO = "algorithm.policy_loss=m2po"
STALE = ("trainer.v1.trainer_mode=stale_k", "trainer.v1.stale_k.staleness_updates=8")
SIZES = ("data.train_batch_size=16", "actor_rollout_ref.actor.ppo_mini_batch_size=4")
BYPASS = "algorithm.rollout_correction.bypass_mode"
SEES = '{"vision_config": {}}'


@functools.cache
def verls(*overrides: str):
    """verl's own config with `overrides`, Hydra's section included. Shared: do not change it."""
    with verl_hydra():
        return compose("ppo_trainer", overrides=list(overrides), return_hydra_config=True)


def one(problems) -> Problem:
    (problem,) = problems
    return problem


def test_distillation_that_throws_the_policy_loss_away_is_refused():
    on = ("distillation.enabled=true", "distillation.distillation_loss.use_task_rewards=false")
    problem = one(effects.distillation(verls(M2PO, *on)))
    assert problem.key == "distillation.distillation_loss.use_task_rewards" and problem.is_fatal
    assert "the loss m2po would be without effect" in problem.why
    assert not list(effects.distillation(verls(*on)))
    assert not list(effects.distillation(verls(M2PO, on[0])))


@pytest.mark.parametrize("name", ["remax", "optimal_token_baseline", "tir_optimal_token_baseline", "gdpo"])
def test_estimators_that_the_v1_trainer_does_not_feed_are_refused(name):
    problem = one(effects.estimator(verls(M2PO, f"algorithm.adv_estimator={name}")))
    assert (problem.key, problem.value, problem.is_fatal) == ("algorithm.adv_estimator", name, True)
    replayed = one(effects.estimator(verls(M2PO, f"algorithm.adv_estimator={name}", "trainer.v1.trainer_mode=replay")))
    assert replayed.key == problem.key and replayed.is_fatal
    assert not list(effects.estimator(verls(M2PO, f"algorithm.adv_estimator={name}", "trainer.use_v1=false")))
    assert not list(effects.estimator(verls(M2PO, "algorithm.adv_estimator=grpo")))


@pytest.mark.parametrize(("key", "value"), [("rollout_rs", "token_k1"), ("loss_type", "reinforce")])
def test_what_bypass_mode_drops_is_refused(key, value):
    setting = f"algorithm.rollout_correction.{key}={value}"
    problem = one(effects.bypassed(verls(M2PO, f"{BYPASS}=true", setting)))
    assert (problem.key, problem.value) == (f"algorithm.rollout_correction.{key}", value) and problem.is_fatal
    assert not list(effects.bypassed(verls(M2PO, f"{BYPASS}=false", setting)))
    assert not list(effects.bypassed(verls("algorithm.policy_loss=bypass_mode", f"{BYPASS}=true", setting)))


def test_a_kl_in_the_reward_of_stale_data_is_mentioned():
    problem = one(effects.kl_in_reward(verls(M2PO, *STALE, "algorithm.use_kl_in_reward=true")))
    assert problem.key == "algorithm.use_kl_in_reward" and not problem.is_fatal and "behaviour policy" in problem.why
    assert not list(effects.kl_in_reward(verls(M2PO, "algorithm.use_kl_in_reward=true")))
    assert not list(effects.kl_in_reward(verls(M2PO, *STALE)))


def test_a_clip_range_that_the_loss_does_not_have_is_one_line():
    low_high = ("actor_rollout_ref.actor.clip_ratio_low=0.1", "actor_rollout_ref.actor.clip_ratio_high=0.28")
    problem = one(effects.clip(verls(M2PO, *low_high)))
    assert "clip_ratio_low, actor_rollout_ref.actor.clip_ratio_high=0.1, 0.28" in str(problem) and not problem.is_fatal
    assert not list(effects.clip(verls(M2PO)))
    assert not list(effects.clip(verls(*low_high)))


def test_context_parallel_under_mini_batch_scope_is_refused_before_anything_loads():
    megatron = ("model_engine=megatron", "actor_rollout_ref.actor.megatron.dynamic_context_parallel=true")
    message = str(one(losses.problems(verls(M2PO, *megatron))))
    assert "policy_loss.m2po.scope=mini_batch cannot be honoured" in message and "scope=micro_batch" in message
    micro = "actor_rollout_ref.actor.policy_loss.m2po.scope=micro_batch"
    assert not list(losses.problems(verls(M2PO, *megatron, micro)))


class TestInactiveModes:
    """Someone would publish curves "at staleness 256" that are on-policy."""

    def test_a_staleness_without_its_mode_is_refused_even_where_nothing_else_is_ours(self):
        with pytest.raises(SystemExit) as refusal:
            callback.PreflightCallback().on_job_start(verls("trainer.v1.stale_k.staleness_updates=2"))
        assert "trainer.v1.stale_k.staleness_updates=2: trainer.v1.trainer_mode=sync does not read it" in str(
            refusal.value
        )
        assert "Add trainer.v1.trainer_mode=stale_k" in str(refusal.value)

    def test_every_key_of_another_mode_is(self):
        found = list(inactive.problems(verls(*STALE, "trainer.v1.bounded_async.min_usable_share=0.5")))
        assert [problem.key for problem in found] == ["trainer.v1.bounded_async.min_usable_share"]

    def test_keys_of_the_chosen_mode_and_of_verls_are_not(self):
        assert not list(inactive.problems(verls(*STALE, "trainer.v1.separate_async.parameter_sync_step=2")))


@pytest.mark.parametrize(("strategy", "replays"), [("fsdp", False), ("fsdp2", False), ("megatron", True)])
def test_routes_that_no_engine_replays_are_refused(strategy, replays):
    config = verls(M2PO, f"{effects.STRATEGY}={strategy}", f"{effects.ROUTER_REPLAY}=true")
    assert [problem.key for problem in effects.router_replay(config)] == [effects.ROUTER_REPLAY] * (not replays)
    assert not list(effects.router_replay(verls(M2PO, f"{effects.STRATEGY}={strategy}")))


class TestImages:
    """What verl would find out in its workers, or when it reads the first image."""

    @staticmethod
    def run_with(tmp_path, own: str, *overrides: str, image="images"):
        """Of a model whose config.json is `own`, on data with a column of images."""
        (tmp_path / "config.json").write_text(own)
        pd.DataFrame({"prompt": ["a"], image: ["b"]}).to_parquet(tmp_path / "a.parquet")
        files = (f"actor_rollout_ref.model.path={tmp_path}", f"data.train_files={tmp_path / 'a.parquet'}")
        return verls(*STALE, *files, *overrides)

    def test_images_for_a_model_of_text(self, tmp_path):
        problem = one(images.blind(self.run_with(tmp_path, "{}")))
        assert problem.key == "data.image_key" and "takes text only" in problem.why
        assert not list(images.blind(self.run_with(tmp_path, "{}", image="pictures")))
        named = self.run_with(tmp_path, "{}", "data.image_key=pictures", image="pictures")
        assert one(images.blind(named)).value == "pictures"
        assert not list(images.blind(self.run_with(tmp_path, SEES)))
        assert not list(images.blind(verls(*STALE, "data.image_key=images"))), "what is not here is not judged"

    @pytest.mark.parametrize("name", images.PROCESSORS)
    def test_a_processor_that_is_missing(self, tmp_path, name):
        config = self.run_with(tmp_path, SEES)
        problem = one(images.processor(config))
        assert problem.key == "actor_rollout_ref.model.path" and name in problem.why
        (tmp_path / name).write_text("{}")
        assert not list(images.processor(config))
        assert not list(images.processor(self.run_with(tmp_path, "{}")))

    def test_packages_that_are_missing(self, tmp_path, monkeypatch):
        config = self.run_with(tmp_path, SEES)
        monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: None if name == "qwen_vl_utils" else name)
        problem = one(images.packages(config))
        assert "qwen_vl_utils cannot be imported" in problem.why and "pip install qwen-vl-utils)" in problem.remedy
        assert not list(images.packages(self.run_with(tmp_path, SEES, "data.custom_cls.path=a.py")))
        assert not list(images.packages(self.run_with(tmp_path, SEES, image="pictures")))
        monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: name)
        assert not list(images.packages(config))

    def test_a_rollout_that_would_see_noise(self, tmp_path, monkeypatch):
        """vLLM 0.28 is what the tests run with."""
        here = self.run_with(tmp_path, SEES, f"{images._ROLLOUT}.name=vllm")
        problem = one(images.normalization(here))
        assert (problem.key, problem.value) == (images.LOAD_FORMAT, "dummy") and images.NORMALIZES in problem.remedy
        for sound in (f"+{images.NORMALIZES}=false", f"{images.LOAD_FORMAT}=auto", f"{images._ROLLOUT}.name=sglang"):
            assert not list(images.normalization(self.run_with(tmp_path, SEES, f"{images._ROLLOUT}.name=vllm", sound)))
        monkeypatch.setattr(images, "_vllm_can_normalize", lambda: False)
        assert not list(images.normalization(here))
        assert not list(images.normalization(self.run_with(tmp_path, "{}", f"{images._ROLLOUT}.name=vllm")))

    @pytest.mark.parametrize("found", [14, None, "wide", 0])
    def test_what_a_token_of_an_image_costs(self, tmp_path, found):
        """Qwen2-VL's: 28 x 28 pixels, two frames, as float32 and as a picture."""
        own = json.dumps({"vision_config": {} if found is None else {"patch_size": found}})
        assert images.bytes_per_prompt_token(self.run_with(tmp_path, own)) == 28 * 28 * 2 * (3 * 4 + 3)
        assert images.bytes_per_prompt_token(self.run_with(tmp_path, own, image="pictures")) == 0
        assert images.bytes_per_prompt_token(self.run_with(tmp_path, "{}")) == 0

    def test_images_are_counted_in_the_memory_that_waits(self, tmp_path):
        """Once for a group of those that wait, and for every row of the batch that is unpacked ahead."""
        config = self.run_with(tmp_path, SEES, "trainer.v1.stale_k.buffer_memory_limit_gib=1e-9")
        (text,) = memory.fits(config, None, lambda _: 0)
        (seen,) = memory.fits(config, None, images.bytes_per_prompt_token)
        assert "if all of a prompt is image" in seen.why and "image" not in text.why
        names = ("data.train_batch_size", "actor_rollout_ref.rollout.n", "data.max_prompt_length")
        batch, responses, prompt = (read(config, name) for name in names)
        steps = 3
        more = memory.estimate_buffer_bytes(config, steps, 100) - memory.estimate_buffer_bytes(config, steps)
        assert more == 100 * prompt * batch * (steps + 1 + responses)


class TestModels:
    """What a mode cannot keep or push; verl's own can."""

    @pytest.mark.parametrize(
        ("targets", "missing"), [("[q_proj,nope]", "nope"), ("no.*", "no.*"), ("all-linear", ""), ("[q_proj]", "")]
    )
    def test_targets_of_an_adapter_that_the_model_does_not_have(self, tiny, targets, missing):
        model = (f"actor_rollout_ref.model.path={tiny}", f"actor_rollout_ref.model.target_modules={targets}")
        found = list(models.lora(verls(*model, "actor_rollout_ref.model.lora_rank=8")))
        assert [problem.key for problem in found] == ["actor_rollout_ref.model.target_modules"] * bool(missing)
        assert all(f"no module {missing}; its modules are named" in problem.why for problem in found)
        assert all("down_proj" in problem.why for problem in found)
        assert not list(models.lora(verls(*model))), "no adapter is trained"


@pytest.mark.parametrize("kl", models.KL)
def test_a_critic_that_would_get_the_order_for_the_actors_adapters_is_refused(kl):
    lora, gae = "actor_rollout_ref.model.lora_rank=8", "algorithm.adv_estimator=gae"
    problem = one(models.adapters_beside_a_critic(verls(lora, gae, f"{kl}=true")))
    assert (problem.key, problem.value) == ("algorithm.adv_estimator", "gae") and kl in problem.why
    for sound in ((lora, gae), (gae, f"{kl}=true"), (lora, "algorithm.adv_estimator=grpo", f"{kl}=true")):
        assert not list(models.adapters_beside_a_critic(verls(*sound)))


def main_of(name: str, source: str, tmp_path):
    """The main of a module with this name and source, as `python -m <name>` would run it."""
    (tmp_path / "program.py").write_text(source)
    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace(name=name)
    module.__file__ = str(tmp_path / "program.py")
    sys.modules[name] = module
    exec(compile(source, module.__file__, "exec"), vars(module))
    return module.main


OWN = """
class RayDAPOTrainer: ...
class TaskRunner:
    def run(self, config): RayDAPOTrainer()
def main(config):
    from verl.trainer.main_ppo import run_ppo
    run_ppo(config, TaskRunner)
"""
V1 = """
def main(config):
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
    run_ppo(config, TaskRunnerV1)
"""
WRAPPER = "from verl.trainer.main_ppo import main as verls\ndef main(config): verls(config)"


class TestEntryPoints:
    """A main with a trainer of its own never reads `trainer.v1`: it would train synchronously and exit with 0."""

    @pytest.fixture(autouse=True)
    def modules(self, monkeypatch):
        monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def test_verls_main_runs_every_mode(self):
        from verl.trainer.main_ppo import main

        assert not list(entry_point.problems(verls(M2PO, *STALE), main))

    @pytest.mark.parametrize("source", [V1, WRAPPER], ids=["v1", "wrapper"])
    def test_own_mains_that_start_verls_v1_trainer_do_too(self, source, tmp_path):
        assert not list(entry_point.problems(verls(M2PO, *STALE), main_of("mine.main", source, tmp_path)))

    @pytest.mark.parametrize("name", ["recipe.dapo.main_dapo", "mine.main"])
    def test_own_trainers_are_refused_by_the_mode_and_named(self, name, tmp_path):
        main = main_of(name, OWN, tmp_path)
        problem = one(entry_point.problems(verls(M2PO, *STALE), main))
        assert problem.key == "trainer.v1.trainer_mode" and problem.is_fatal and name in problem.why
        assert not list(entry_point.problems(verls(M2PO), main))

    @pytest.mark.parametrize(
        "module",
        ["verl.experimental.one_step_off_policy.main_ppo", "verl.experimental.fully_async_policy.fully_async_main"],
    )
    def test_verls_experimental_mains(self, module):
        """By their source: importing them needs what a GPU machine has."""
        import importlib.util

        spec = importlib.util.find_spec(module)
        found = types.ModuleType(module)
        found.__spec__, found.__file__ = spec, spec.origin
        sys.modules[module] = found
        assert entry_point.trainer_of(found) == "own"
        main = types.FunctionType((lambda config: None).__code__, vars(found))
        main.__module__ = module
        assert one(entry_point.problems(verls(M2PO, *STALE, f"{BYPASS}=true"), main)).key == "trainer.v1.trainer_mode"
        # The age disappears whatever the key of a trainer that they do not use says, and that one is not blamed.
        problem = one(entry_point.problems(verls(M2PO, f"{BYPASS}=false"), main))
        assert (
            problem.key == BYPASS and "age of the data disappears" in problem.why and "trainer_mode" not in problem.why
        )
        assert not list(entry_point.problems(verls(M2PO, f"{BYPASS}=true"), main))
        assert not list(entry_point.problems(verls(f"{BYPASS}=false"), main))

    def test_what_cannot_be_told_is_mentioned(self, tmp_path):
        main = main_of("mine.main", "def main(config): ...", tmp_path)
        problem = one(entry_point.problems(verls(M2PO, *STALE), main))
        assert problem.key == "trainer.v1.trainer_mode" and not problem.is_fatal

    @pytest.mark.slow
    def test_through_hydra_as_a_program(self, tmp_path):
        """Through `python main.py`: nothing of it runs."""
        path_and_name = 'config_path="pkg://verl.trainer.config", config_name="ppo_trainer"'
        decorated = f"import hydra, verl\n@hydra.main({path_and_name}, version_base=None)\ndef main"
        source = OWN.replace("def main", decorated) + "main()\n"
        (tmp_path / "main_mine.py").write_text(source)
        command = [sys.executable, "main_mine.py", M2PO, *STALE]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and "main_mine.py has a trainer of its own" in done.stderr


ROW = {"prompt": [{"role": "user", "content": "1+1"}], "data_source": "a", "reward_model": {"ground_truth": "2"}}


class TestData:
    """verl takes it, or can be known not to."""

    @pytest.fixture
    def config(self, tmp_path):
        def make(rows: int, columns: dict, *overrides: str):
            pd.DataFrame({name: [value] * rows for name, value in columns.items()}).to_parquet(tmp_path / "a.parquet")
            return verls(
                f"data.train_files={tmp_path / 'a.parquet'}",
                f"data.val_files={tmp_path / 'a.parquet'}",
                *SIZES,
                *overrides,
            )

        return make

    @staticmethod
    def found(config) -> list[Problem]:
        asked = [
            check for check in registry.of_the_machine() if check.about in (data.TRAIN, data.VALIDATION, data.FILTER)
        ]
        return ask_all(asked, config)

    def test_another_name_of_the_prompts(self, config):
        row = {"question": ROW["prompt"], **{key: ROW[key] for key in ("data_source", "reward_model")}}
        assert not self.found(config(16, row, "data.prompt_key=question"))
        assert "lacks the column(s) prompt" in str(self.found(config(16, row))[0])

    def test_a_data_set_class_of_the_users_reads_what_it_wants(self, config):
        changes = ("data.custom_cls.path=/my/data.py", "data.custom_cls.name=Mine", "data.train_files=[hub/name]")
        assert not self.found(config(1, {"a": 1}, *changes))

    def test_a_reward_model_needs_no_answer(self, config):
        row = {"prompt": ROW["prompt"]}
        assert not self.found(config(16, row, "reward.reward_model.enable=true"))
        function = "reward.custom_reward_function.path=/my/reward.py"
        assert "data_source, reward_model" in str(
            self.found(config(16, row, "reward.reward_model.enable=true", function))[0]
        )

    @pytest.mark.parametrize("rows", [0, 15])
    def test_fewer_rows_than_a_batch_are_refused_by_the_batch(self, config, rows):
        found = {problem.key: problem for problem in self.found(config(rows, ROW))}
        assert f"has {rows} prompts, fewer than a batch" in found["data.train_batch_size"].why
        assert ("data.val_files" in found) == (rows == 0)
        assert not self.found(config(16, ROW))
        few = self.found(config(16, ROW, "data.train_max_samples=15"))
        assert "has 15 prompts" in one(few).why

    def test_prompts_that_would_be_cut_are_mentioned(self, config):
        long = ROW | {"prompt": [{"role": "user", "content": "1+1" * 100}]}
        problem = one(self.found(config(16, long, "data.max_prompt_length=64")))
        assert problem.key == "data.filter_overlong_prompts" and not problem.is_fatal and "300 bytes" in problem.why
        assert not self.found(config(16, long, "data.max_prompt_length=64", "data.filter_overlong_prompts=true"))

    def test_epochs_end_a_run_too(self, config):
        """64 rows, batch 8, one epoch: 8 steps, whatever total_training_steps says."""
        changes = (
            *STALE[:1],
            "trainer.v1.stale_k.staleness_updates=20",
            "data.train_batch_size=8",
            "trainer.total_epochs=1",
        )
        made = config(
            64, ROW, *changes, "actor_rollout_ref.actor.ppo_mini_batch_size=4", "trainer.total_training_steps=40"
        )
        found = registry.problems(made, is_ours=True)
        problem = one(problem for problem in found if problem.key == "trainer.v1.stale_k.staleness_updates")
        assert "the run has 8 trainer steps of 2 updates" in problem.why and "at most 14" in problem.remedy

    @pytest.mark.parametrize(
        ("steps", "prompts", "planned"), [(40, 64, 8), (4, 64, 4), (None, 64, 8), (40, None, 40), (None, None, None)]
    )
    def test_the_planned_steps_are_the_smaller_of_the_two(self, steps, prompts, planned):
        config = composed(
            "data.train_batch_size=8",
            f"trainer.total_training_steps={steps}".replace("None", "null"),
            "trainer.total_epochs=1",
        )
        assert checks.planned_steps(config, prompts) == planned


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (None, "it cannot be read (No such file or directory)"),
        ("tools: [", "it is no YAML"),
        ("- a", "it has no list `tools`"),
        ("tools: []", "it has no list `tools`"),
        ("tools: [{class_name: Calculator}]", "tool 1 has no class_name of the form module.Class"),
        ("tools: [{class_name: mine.Calculator}]", "tool 1 (mine.Calculator) has no config.type=native"),
        ("tools: [{class_name: mine.Calculator, config: {type: native}}]", None),
    ],
)
def test_a_configuration_of_tools_that_does_not_parse_is_refused(tmp_path, written, said):
    path = tmp_path / "tools.yaml"
    if written is not None:
        path.write_text(written)
    found = list(tools.config(verls(f"{tools.CONFIG.key}={path}")))
    assert [problem.key for problem in found] == [tools.CONFIG.key] * (said is not None)
    assert all(str(said) in problem.why for problem in found)


@pytest.mark.parametrize(("written", "count"), [("def f(:", 1), ("def f(): pass", 0)])
def test_tool_functions_that_are_no_python_are_refused(tmp_path, written, count):
    (tmp_path / "tools.py").write_text(written)
    found = list(tools.functions(verls(f"{tools.FUNCTIONS.key}={tmp_path / 'tools.py'}")))
    assert [problem.key for problem in found] == [tools.FUNCTIONS.key] * count


def test_nothing_is_asked_of_tools_that_are_not_there():
    assert not [*tools.config(verls()), *tools.functions(verls())]
