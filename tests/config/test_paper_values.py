"""The paper's runs have the paper's values (Table 1, project page and published scripts of arXiv:2510.01161)."""

import pytest
from composing import composed, select

MODELS = {
    "llama3_2_3b_instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "qwen2_5_math_7b": "Qwen/Qwen2.5-Math-7B",
    "qwen3_1_7b_base": "Qwen/Qwen3-1.7B-Base",
    "qwen3_4b_base": "Qwen/Qwen3-4B-Base",
    "qwen3_8b_base": "Qwen/Qwen3-8B-Base",
    "qwen2_5_32b": "Qwen/Qwen2.5-32B",
}
PUBLISHED = {
    "data.train_batch_size": 256,
    "actor_rollout_ref.rollout.n": 8,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 64,
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.optim.lr": 1e-6,
    "data.max_prompt_length": 1536,
    "data.max_response_length": 2560,
    "actor_rollout_ref.actor.use_dynamic_bsz": True,
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 30000,
    "actor_rollout_ref.actor.policy_loss.m2po.threshold": 0.04,
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.entropy_coeff": 0,
    "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.rollout.val_kwargs.n": 4,
    "actor_rollout_ref.rollout.val_kwargs.do_sample": True,
    "actor_rollout_ref.rollout.val_kwargs.temperature": 1.0,
    "actor_rollout_ref.rollout.val_kwargs.top_p": 0.7,
    "trainer.n_gpus_per_node": 8,
    "trainer.test_freq": 50,
    "trainer.v1.trainer_mode": "stale_k",
    "trainer.v1.stale_k.staleness_updates": 256,
}


@pytest.mark.parametrize("recipe", ["paper_table1", "paper_fig1_prosperity_before_collapse"])
def test_published_setting(recipe):
    config = composed(recipe)
    found = {key: select(config, key) for key in PUBLISHED}
    assert found == pytest.approx(PUBLISHED)


def test_table1_trains_1201_steps():
    assert composed("paper_table1").trainer.total_training_steps == 1201


@pytest.mark.parametrize(("option", "path"), MODELS.items())
def test_models_of_table1(option, path):
    assert composed("paper_table1", f"model={option}").actor_rollout_ref.model.path == path


def test_grpo_is_clipped_symmetrically_and_has_no_dual_clip():
    actor = composed("paper_table1", "loss=grpo").actor_rollout_ref.actor
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_c) == (0.2, 0.2, 100000)


def test_aime_has_sixteen_samples_a_problem_and_the_others_four(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = composed("paper_table1")
    files = list(config.data.val_files)
    samples = {file.split("/")[-2]: files.count(file) * config.actor_rollout_ref.rollout.val_kwargs.n for file in files}
    four = {name: 4 for name in ("amc23", "amc24", "math500", "gaokao", "minerva", "olympiad")}
    assert samples == {"aime24": 16, "aime25": 16, **four}
