import pytest
from report_logs import write_config

from verl_m2po.report.reading.settings import read_config, settings


@pytest.mark.parametrize(
    ("name", "base_name", "loss", "staleness_updates", "seed"),
    [
        ("m2po-s256-seed3", "m2po-s256", "m2po", 256, 3),
        ("m2po_clip_s16_seed_0", "m2po_clip_s16", "m2po_clip", 16, 0),
        ("no-trust-region-s64", "no-trust-region-s64", "no_trust_region", 64, None),
        ("grpo-on-policy-seed12", "grpo-on-policy", "grpo", 0, 12),
        ("vanilla-stale256", "vanilla-stale256", "grpo", 256, None),
        ("seed3/m2po-s4", "m2po-s4", "m2po", 4, 3),
        ("my experiment", "my experiment", None, None, None),
        ("seed7", "seed7", None, None, 7),
        ("rec_gspo_is-s256-seed1", "rec_gspo_is-s256", "rec_gspo_is", 256, 1),
        ("bapo_code-s16", "bapo_code-s16", "bapo_code", 16, None),
        ("rec-vs-no_trust_region", "rec-vs-no_trust_region", "rec", None, None),
        ("old/opsm-s8-seed2", "old/opsm-s8", "opsm", 8, 2),
        ("qwen-m2po_clip-s4", "qwen-m2po_clip-s4", "m2po_clip", 4, None),
        ("s1-math-grpo", "s1-math-grpo", "grpo", None, None),
        ("m2po/s256/seed1", "m2po/s256", "m2po", 256, 1),
    ],
)
def test_a_name_says_what_the_run_was(name, base_name, loss, staleness_updates, seed):
    known = settings(name, {})
    assert (known.base_name, known.loss, known.staleness_updates, known.seed) == (
        base_name,
        loss,
        staleness_updates,
        seed,
    )


def test_verls_unresolved_hydra_config_is_understood(tmp_path):
    write_config(
        tmp_path / ".hydra",
        algorithm__policy_loss="m2po",
        actor_rollout_ref__actor__policy_loss__loss_mode="${algorithm.policy_loss}",
        actor_rollout_ref__actor__policy_loss__m2po__threshold=0.08,
        trainer__v1__trainer_mode="stale_k",
        trainer__v1__stale_k__staleness_updates=64,
        data__seed=5,
    )
    config, problems = read_config(tmp_path)
    known = settings("anything", config)
    assert problems == []
    assert (known.loss, known.staleness_updates, known.threshold, known.seed) == ("m2po", 64, 0.08, 5)


def test_the_config_wins_over_the_name():
    known = settings("grpo-s4", {"loss": "m2po", "staleness_updates": 256})
    assert (known.loss, known.staleness_updates) == ("m2po", 256)


def test_options_that_share_a_registered_loss_are_told_apart_by_their_label():
    config = {"algorithm.policy_loss": "rec", "algorithm.policy_loss_label": "rec_gspo_is"}
    assert settings("run", config).loss == "rec_gspo_is"
    unlabelled = {"algorithm.policy_loss": "m2po", "algorithm.policy_loss_label": "${oc.select:algorithm.policy_loss}"}
    assert settings("run", unlabelled).loss == "m2po"


def test_verls_sync_mode_is_on_policy():
    known = settings("run", {"trainer.v1.trainer_mode": "sync", "loss": "vanilla"})
    assert (known.loss, known.staleness_updates) == ("grpo", 0)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch HACKED']", "a: [1", "\ta: 1"])
def test_a_config_that_is_not_plain_yaml_is_a_line_and_runs_nothing(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    config, problems = read_config(tmp_path)
    assert config == {} and len(problems) == 1
    assert not (tmp_path / "HACKED").exists()


def test_resolvers_are_never_run():
    """An environment variable must not reach a page that is sent to others."""
    assert settings("run", {"loss": "${oc.env:HOME}"}).loss is None


def test_references_in_a_circle_end():
    assert settings("run", {"loss": "${a}", "a": "${b}", "b": "${a}"}).loss is None


def test_vanilla_is_grpo_only_with_group_relative_advantages():
    assert settings("run", {"loss": "vanilla", "algorithm.adv_estimator": "gae"}).loss == "vanilla"
    assert settings("run", {"loss": "vanilla", "algorithm.adv_estimator": "grpo"}).loss == "grpo"


def test_a_threshold_that_is_off_is_not_a_limit():
    assert settings("m2po", {"threshold": float("inf")}).threshold is None
