import numpy as np
import pandas as pd
import pytest
from report_logs import write_config, write_log

from verl_m2po.report.build import build
from verl_m2po.report.reading.groups import group_runs, over_seeds, tasks_of
from verl_m2po.report.reading.runs import read_runs

ACCURACY = "val-core/openai/gsm8k/acc/mean@8"


def log(tmp_path, name: str, **config):
    write_log(tmp_path / name / "attempt-1.jsonl", {1: {ACCURACY: 0.5}})
    if config:
        write_config(tmp_path / name, **config)


def groups_in(tmp_path):
    return group_runs(read_runs([tmp_path])[0])


def test_seeds_in_the_name_are_one_group(tmp_path):
    for seed in (3, 1, 2):
        log(tmp_path, f"m2po-s256-seed{seed}")
    log(tmp_path, "grpo-s256-seed1")
    groups = groups_in(tmp_path)
    assert [(g.label, [r.settings.seed for r in g.runs]) for g in groups] == [
        ("grpo, s=256", [1]),
        ("m2po, s=256", [1, 2, 3]),
    ]


def test_configs_that_differ_in_the_seed_only_are_one_group(tmp_path):
    for n, seed in enumerate((1, 2)):
        log(tmp_path, f"run{n}", loss="m2po", staleness_updates=4, seed=seed, trainer__default_local_dir=f"out{n}")
    (group,) = groups_in(tmp_path)
    assert group.label == "m2po, s=4" and len(group.runs) == 2


def test_configs_that_differ_otherwise_are_apart_and_say_in_what(tmp_path):
    for n, threshold in enumerate((0.01, 0.04)):
        log(tmp_path, f"run{n}", loss="m2po", staleness_updates=4, threshold=threshold)
    assert [g.label for g in groups_in(tmp_path)] == ["m2po, s=4 (threshold=0.01)", "m2po, s=4 (threshold=0.04)"]


@pytest.mark.parametrize(
    "key",
    [
        "actor_rollout_ref__model__path",
        "data__train_files",
        "reward__custom_reward_function__path",
        "actor_rollout_ref__actor__optim__lr",
    ],
)
@pytest.mark.parametrize("names", [("run1", "run2"), ("m2po-s256-seed1", "m2po-s256-seed2")])
def test_another_model_data_or_rate_is_another_experiment_whatever_the_names(tmp_path, key, names):
    for seed, name in enumerate(names):
        log(tmp_path, f"{seed}/{name}", loss="m2po", staleness_updates=256, seed=seed, **{key: f"value{seed}"})
    assert [len(g.runs) for g in groups_in(tmp_path)] == [1, 1]


def test_seeds_that_write_to_their_own_places_are_one_group(tmp_path):
    for seed in (1, 2):
        log(
            tmp_path,
            f"m2po-s256-seed{seed}",
            data__seed=seed,
            data__train_files="data/train.parquet",
            trainer__default_local_dir=f"checkpoints{seed}",
            trainer__rollout_data_dir=f"rollouts{seed}",
            trainer__experiment_name=f"m2po-s256-seed{seed}",
            trainer__v1__stale_k__ledger_path=f"ledger{seed}.jsonl",
            trainer__v1__stale_k__journal_path=f"journal{seed}",
            hydra__run__dir=f"hydra{seed}",
        )
    (group,) = groups_in(tmp_path)
    assert [run.settings.seed for run in group.runs] == [1, 2]


def test_copies_of_one_run_are_named_and_kept(tmp_path):
    for folder in ("x", "y"):
        log(tmp_path, f"{folder}/run", loss="m2po", staleness_updates=4, seed=1)
    log(tmp_path, "z", loss="m2po", staleness_updates=4, seed=2)
    report = build([tmp_path])
    assert [len(group.runs) for group in report.groups] == [3]
    assert "m2po, s=4: runs x/run and y/run have the same seed (1) and count as 2 seeds" in report.problems


def test_runs_that_differ_in_another_seed_than_the_first_are_no_copies(tmp_path):
    for seed in (1, 2):
        log(tmp_path, f"run{seed}", loss="m2po", actor_rollout_ref__rollout__seed=seed)
    report = build([tmp_path])
    assert [len(group.runs) for group in report.groups] == [2] and not any("seed" in line for line in report.problems)


def test_the_same_names_in_two_folders_are_two_groups(tmp_path):
    """Two experiments must not be averaged because their runs are called alike."""
    for folder in ("old", "new"):
        for seed in (1, 2):
            log(tmp_path, f"{folder}/m2po-s4-seed{seed}")
    groups = groups_in(tmp_path)
    assert [len(g.runs) for g in groups] == [2, 2]
    assert len({g.label for g in groups}) == 2
    assert all(len({r.name.split("/")[0] for r in g.runs}) == 1 for g in groups)


def test_labels_are_unique_even_for_copies(tmp_path):
    for folder in ("x", "y"):
        log(tmp_path, f"{folder}/run", loss="m2po", staleness_updates=4)
    log(tmp_path, "run", loss="m2po", staleness_updates=8)
    labels = [g.label for g in groups_in(tmp_path)]
    assert len(labels) == len(set(labels))


def test_a_task_may_have_slashes_and_the_largest_k_counts(tmp_path):
    rows = {1: {ACCURACY: 0.5, "val-core/openai/gsm8k/acc/mean@1": 0.4, "val-core/openai/gsm8k/acc/best@8/mean": 0.9}}
    write_log(tmp_path / "exp.jsonl", rows)
    assert tasks_of(groups_in(tmp_path)) == {"openai/gsm8k/acc": {"exp": ACCURACY}}


def test_the_training_score_stands_in_only_where_nobody_validated(tmp_path):
    write_log(tmp_path / "a.jsonl", {1: {"critic/score/mean": 0.1}})
    assert tasks_of(groups_in(tmp_path)) == {"critic/score/mean": {"a": "critic/score/mean"}}
    write_log(tmp_path / "b.jsonl", {1: {ACCURACY: 0.1}})
    assert tasks_of(groups_in(tmp_path)) == {"openai/gsm8k/acc": {"b": ACCURACY}}


def test_over_seeds_equals_the_slow_mean_and_marks_where_the_shortest_ended():
    a = pd.Series([0.1, 0.2, 0.3], index=[0, 10, 20])
    b = pd.Series([0.3, 0.6], index=[0, 10])
    seeds = over_seeds([a, b])
    assert seeds.mean.to_dict() == pytest.approx({0: 0.2, 10: 0.4})
    assert seeds.low.to_dict() == {0: 0.1, 10: 0.2} and seeds.high.to_dict() == {0: 0.3, 10: 0.6}
    assert seeds.tail.to_dict() == pytest.approx({10: 0.4, 20: 0.3})
    assert seeds.count == 2


def test_over_seeds_does_not_depend_on_their_order():
    random = np.random.default_rng(0)
    series = [pd.Series(random.normal(size=5), index=range(n, n + 5)) for n in range(3)]
    forth, back = over_seeds(series), over_seeds(series[::-1])
    pd.testing.assert_series_equal(forth.mean, back.mean)
    pd.testing.assert_series_equal(forth.low, back.low)


def test_over_no_seeds_is_empty():
    assert over_seeds([]).count == 0 and not len(over_seeds([]).mean)
