"""`verl-m2po plan`: numbers in, plan out, and one clear line for what cannot be planned."""

import json

import numpy as np
import pytest
from report_logs import write_config, write_log
from typer.testing import CliRunner

from verl_m2po.cli.main import app
from verl_m2po.planner.compare import pareto, recommend, splits, stalenesses
from verl_m2po.planner.facts import SUPPLIES, Facts
from verl_m2po.planner.readings import read_ledger_facts, read_run
from verl_m2po.planner.workload import PlanError

NUMBERS = {
    "--devices": "8",
    "--batch-size": "8",
    "--responses": "4",
    "--updates-per-step": "4",
    "--max-length": "1024",
    "--lengths": "0.5:100,0.9:400",
    "--tokens-per-s": "1:50,16:500",
    "--update-s": "10",
    "--push-s": "1",
    "--max-staleness": "8",
    "--simulate-steps": "3",
}


def plan(*more: str, without: tuple[str, ...] = (), numbers=NUMBERS):
    options = [part for name, value in numbers.items() if name not in without for part in (name, value)]
    result = CliRunner().invoke(app, ["plan", *options, *more], env={"COLUMNS": "1000"})
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def planned(*more: str) -> dict:
    code, output = plan("--json", *more)
    assert code == 0, output
    return json.loads(output)


def test_every_mode_split_and_staleness_is_compared_in_named_units():
    told = planned("--cost-per-hour", "2")
    settings = told["settings"]
    assert {each["mode"] for each in settings} == {"sync", "stale_k", "stale_k_separate", "bounded_async"}
    assert {each["staleness_updates"] for each in settings if each["mode"] == "bounded_async"} == {0, 4, 8}
    assert {each["generating_devices"] for each in settings if each["mode"] == "bounded_async"} == {2, 4, 5, 6, 7}
    for each in settings:
        assert each["step_s_mean"] >= 10 * 1 / 8
        assert each["age_updates_mean"] <= each["staleness_updates"]
        assert each["run_cost"] == pytest.approx(each["run_hours"] * 8 * 2)
        assert each["trained_tokens"] == sum(each["trained_tokens_by_age_updates"].values())
        assert (each["buffer_gib_at_full_length"] > 0) == (each["mode"] != "sync")
    overrides = {each["override"].split("=")[0] for each in told["overrides"]}
    assert "trainer.v1.trainer_mode" in overrides
    assert all(each["reason"].endswith(".") for each in told["overrides"])


def test_the_same_seed_plans_the_same():
    assert planned("--seed", "3", "--modes", "bounded_async") == planned("--seed", "3", "--modes", "bounded_async")


def test_hours_are_those_of_all_trainer_steps_and_no_more():
    # A server is as fast with one request as with many.
    alike = ("--lengths", "0:200,1:200", "--tokens-per-s", "1:50,256:50", "--modes", "sync", "--modes", "stale_k")
    for steps in (1, 3, 40):
        for each in planned(*alike, "--run-steps", str(steps))["settings"]:
            # On shared devices every batch takes its time to be generated and to be trained, whenever that is.
            assert each["run_hours"] == pytest.approx(steps * each["step_s_mean"] / 3600)


def test_a_target_age_and_a_deadline_are_kept():
    young = planned("--target-age", "4.0")["recommended"]
    assert young["age_updates_mean"] <= 4.0
    fastest = planned()["recommended"]
    relaxed = planned("--deadline", str(100 * fastest["run_hours"]))["recommended"]
    assert relaxed["age_updates_mean"] == 0.0


def test_replay_is_compared_beside_none_in_the_modes_that_have_it():
    told = planned("--replay", "x2", "--replay", "x4")
    settings = [(each["mode"], each["replay"], each["staleness_updates"]) for each in told["settings"]]
    assert {each[:2] for each in settings} == {
        *((mode, "off") for mode in ("sync", "stale_k", "stale_k_separate", "bounded_async")),
        *((mode, replay) for mode in ("replay", "bounded_async") for replay in ("x2", "x4")),
    }
    assert all(staleness for _, replay, staleness in settings if replay != "off")
    for each in told["settings"]:
        assert 0 <= each["replayed_share"] <= {"off": 0, "x2": 0.5, "x4": 0.75}[each["replay"]]
    # What may be trained again is kept beside what waits.
    kept = {
        each["replay"]: each["buffer_gib_at_full_length"]
        for each in told["settings"]
        if (each["mode"], each["staleness_updates"]) == ("bounded_async", 8)
    }
    assert kept["x2"] == kept["x4"] > kept["off"]
    code, output = plan("--modes", "replay", "--replay", "x4")
    assert code == 0
    assert "trainer.v1.trainer_mode=replay" in output
    assert "replay=x4" in output
    assert "of a batch is new" in output
    assert "replayed" in output


def test_a_server_that_is_replaced_saves_the_restart():
    fails = ("--failures-per-device-year", "1000", "--update-s", "1000", "--simulate-steps", "30")
    fails += ("--modes", "bounded_async", "--splits", "0.875")
    restarted, healed = planned(*fails), planned(*fails, "--replace-s", "60")
    assert sum(each["restarts"] for each in restarted["settings"]) > sum(
        each["restarts"] for each in healed["settings"]
    )
    assert all(each["server_failures"] == 0 for each in restarted["settings"])
    assert any(each["server_failures"] for each in healed["settings"])


def test_a_picture_and_a_table_are_made(tmp_path):
    code, output = plan("--out", str(tmp_path / "plan.svg"), "--modes", "sync", "--modes", "bounded_async")
    assert code == 0
    assert "Recommended:" in output
    assert "replayed" not in output
    assert "…" not in output  # no cell is cut
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    "option", ["--devices", "--batch-size", "--lengths", "--tokens-per-s", "--update-s", "--push-s"]
)
def test_what_is_missing_is_named_with_the_option_that_supplies_it(option):
    code, output = plan(without=(option,))
    assert code == 2
    assert option in output
    assert "not known" in output


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--devices", "0"), "--devices is 0; it must be at least 1"),
        (("--devices", "7", "--server-devices", "2"), "no multiple of --server-devices 2"),
        (("--devices", "1", "--modes", "bounded_async"), "cannot be split"),
        (("--model-billions", "7"), "both say how long a push takes"),
        (("--max-length", "300"), "is above --max-length 300"),
        (("--lengths", "many"), "no list of pairs"),
        (("--tokens-per-s", "8:-1"), "a positive speed"),
        (("--max-staleness", "6"), "set it to 4 or 8"),
        (("--max-staleness", "-1"), "set it to 0"),
        (("--modes", "async"), "there is no such mode"),
        (("--replay", "x3"), "there are x2, x4, x8, remix"),
        (("--replay", "x2", "--modes", "stale_k"), "only replay and bounded_async train a rollout again"),
        (("--modes", "replay"), "give --replay too"),
        (("--replay", "x8", "--batch-size", "4"), "no whole number of the 4 prompts of --batch-size"),
        (("--max-length", "0"), "is above --max-length 0"),
        (("--lengths", "0.9:100,0.5:400"), "must not have a shorter length"),
        (("--lengths", "0.5:100,0.5:400"), "a share is given twice"),
        (("--tokens-per-s", "0:50"), "requests from 1"),
        (("--tokens-per-s", "1.5:50"), "a whole number of requests"),
        (("--max-requests", "0"), "--max-requests is 0; it must be at least 1"),
        (("--update-devices", "0"), "--update-devices is 0; it must be at least 1"),
        (("--prefill-tokens-per-s", "0"), "--prefill-tokens-per-s is 0"),
        (("--target-age", "nan"), "--target-age is nan"),
        (("--deadline", "-1"), "--deadline is -1"),
        (("--replace-s", "inf"), "--replace-s is inf"),
        (("--failures-per-device-year", "1e8", "--replace-s", "60"), "Invalid value for '--failures-per-device-year'"),
        (("--failures-per-device-year", "1000", "--update-s", "1e6"), "repeats more than it trains"),
        (("--speed-spread", "50"), "Invalid value for '--speed-spread'"),
        (("--update-spread", "1000"), "Invalid value for '--update-spread'"),
        (("--seed", "-1"), "Invalid value for '--seed'"),
        (("--prompt-tokens", "-5"), "--prompt-tokens is -5"),
        (("--splits", "2"), "no shares of the devices"),
        (("--update-s", "-3"), "must be 0 or more"),
        (("--target-age", "-1"), "the youngest data are 0.0 updates old"),
        (("--deadline", "0.001"), "hours at best"),
        (("--simulate-steps", "0"), "at least one trainer step"),
        (("--out", "plan.txt"), "must end in .svg"),
        (("nowhere.jsonl",), "is not there"),
    ],
)
def test_bad_input_gives_one_clear_error(more, says):
    given = {name: value for name, value in NUMBERS.items() if name not in more}
    code, output = plan(*more, numbers=given)
    assert code == 2
    assert says in output


def test_a_picture_that_cannot_be_written_is_refused_before_the_simulation(tmp_path, monkeypatch):
    def unexpected(*_):
        raise AssertionError("simulated")

    (tmp_path / "file").touch()
    (tmp_path / "folder.svg").mkdir()
    code, output = plan("--out", str(tmp_path / "folder.svg"), "--modes", "sync")
    assert code == 2 and "which cannot be written" in output
    monkeypatch.setattr("verl_m2po.planner.compare.simulate", unexpected)
    code, output = plan("--out", str(tmp_path / "file" / "p.svg"))
    assert code == 2 and "is no folder: choose another" in output


@pytest.mark.parametrize("option", ["--speed-spread", "--update-spread"])
def test_the_largest_spread_can_be_planned(option):
    assert all(each["step_s_mean"] > 0 for each in planned(option, "1", "--devices", "64")["settings"])


def logged(tmp_path, mode: str, **metrics: float):
    row = {"timing_s/step": 12.0, "timing_s/gen": 3.0, "timing_s/update_weights": 1.0, "prompt_length/mean": 20.0}
    path = write_log(tmp_path / "run" / "metrics.jsonl", {step: row | metrics for step in range(1, 9)})
    write_config(
        tmp_path / "run",
        trainer__v1__trainer_mode=mode,
        trainer__nnodes=1,
        trainer__n_gpus_per_node=6,
        data__train_batch_size=8,
        data__max_response_length=1024,
        actor_rollout_ref__actor__ppo_mini_batch_size=2,
        actor_rollout_ref__actor__ppo_epochs=1,
        actor_rollout_ref__rollout__n=4,
        actor_rollout_ref__rollout__nnodes=1,
        actor_rollout_ref__rollout__n_gpus_per_node=2,
        actor_rollout_ref__rollout__tensor_model_parallel_size=2,
        actor_rollout_ref__rollout__max_num_seqs=64,
    )
    return path


def test_a_run_tells_its_times_and_its_config_the_rest(tmp_path):
    facts = read_run(logged(tmp_path, "sync"))
    assert (facts.update_s, facts.push_s, facts.prompt_tokens) == (8.0, 1.0, 20)
    assert (facts.devices, facts.groups, facts.responses, facts.updates_per_step) == (6, 8, 4, 4)
    assert (facts.longest, facts.max_requests, facts.measured_servers) == (1024, 64, 3)


def test_in_separate_modes_waiting_is_no_training(tmp_path):
    phases = {"timing_s/update_actor": 5.0, "timing_s/adv": 0.5}
    facts = read_run(logged(tmp_path, "bounded_async", **phases))
    assert (facts.update_s, facts.devices, facts.measured_servers) == (5.5, 8, 1)


@pytest.mark.parametrize("mode", ["sync", "bounded_async"])
def test_the_validation_at_which_a_run_resumed_is_no_training_step(tmp_path, mode):
    """verl erases the log of the attempt before, so that nothing else is in that row."""
    path = logged(tmp_path, mode, **{"timing_s/update_actor": 5.0})
    whole = read_run(path)
    with path.open("a") as log:
        log.write('{"step": 40, "data": {"val-core/a/acc/mean@1": 0.5}}\n')
    assert read_run(path).update_s == whole.update_s


def test_an_option_wins_over_the_run(tmp_path):
    read = read_run(logged(tmp_path, "sync"))
    assert Facts(push_s=2.0).over(read).push_s == 2.0
    assert Facts(push_s=2.0).over(read).groups == 8


def test_a_log_of_another_program_is_refused(tmp_path):
    other = write_log(tmp_path / "run" / "metrics.jsonl", {step: {"loss": 1.0} for step in range(1, 9)})
    with pytest.raises(PlanError, match=r"no timing_s/step.*give --update-s"):
        read_run(other)
    (tmp_path / "run" / "metrics.jsonl").write_text("hello\nworld\n")
    with pytest.raises(PlanError, match="not the log of one verl run"):
        read_run(other)


def ledger(tmp_path, batches: int = 5):
    """Every response of 40 tokens takes two seconds; a batch of two groups of two is always in flight."""
    lines = []
    for step in range(batches):
        groups = [
            [0, f"g{step}{i}", 2 * step + i, [[f"g{step}{i}_{j}", [[step, 40]]] for j in range(2)]] for i in range(2)
        ]
        times = [[2.0 * step, 2.0 * step + 2.0]] * 2
        lines.append({"step": step + 1, "version": step, "oldest_version": None, "groups": groups, "generated": times})
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_ledger_tells_lengths_and_speed(tmp_path):
    facts = read_ledger_facts(ledger(tmp_path), servers=1)
    assert facts.speeds == ((4, 80.0),)
    assert facts.lengths is not None
    assert facts.lengths.draw(np.random.default_rng(0), 3, 2, 0) == [[40, 40]] * 3


def test_a_group_that_was_trained_again_was_generated_once(tmp_path):
    once, again = tmp_path / "once", tmp_path / "again"
    once.mkdir(), again.mkdir()
    path = ledger(once)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    repeated = [line | {"step": 2 * i + j} for i, line in enumerate(lines) for j in (1, 2)]
    (again / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in repeated))
    first, second = (read_ledger_facts(folder / "ledger.jsonl", servers=1) for folder in (once, again))
    assert first.speeds == second.speeds
    drawn = [facts.lengths.draw(np.random.default_rng(0), 8, 2, 0) for facts in (first, second) if facts.lengths]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("has_log", [False, True])
def test_how_many_servers_wrote_a_ledger_is_asked_for_where_no_config_says_it(tmp_path, has_log):
    log = logged(tmp_path, "sync")
    (log.parent / "config.yaml").unlink()
    told = ("--ledger", str(ledger(tmp_path)), *((str(log),) if has_log else ()), "--modes", "sync", "--json")
    code, output = plan(*told, without=("--tokens-per-s", "--lengths"))
    assert code == 2
    assert "give --ledger-servers" in output and ("config.yaml beside" in output) == has_log
    steps = []
    for servers in ("1", "2"):
        code, output = plan(*told, "--ledger-servers", servers, without=("--tokens-per-s", "--lengths"))
        assert code == 0, output
        steps.append(json.loads(output)["recommended"]["step_s_mean"])
    assert steps[0] < steps[1]
    # The speed of a server is known: whoever wrote the ledger.
    assert plan(*told, without=("--lengths",))[0] == 0


def test_a_log_without_a_needed_column_says_which_and_what_supplies_it(tmp_path):
    log = logged(tmp_path, "bounded_async")  # no phase of training
    options = ["--ledger", str(ledger(tmp_path)), "--max-staleness", "4"]
    result = CliRunner().invoke(app, ["plan", str(log), *options], env={"COLUMNS": "1000"})
    assert result.exit_code == 2
    assert "update_s (--update-s, or a log with timing_s/update_actor)" in result.output


def test_responses_of_a_ledger_above_the_limit_are_refused(tmp_path):
    result = CliRunner().invoke(
        app,
        ["plan", str(logged(tmp_path, "sync")), "--ledger", str(ledger(tmp_path)), "--max-length", "30"],
        env={"COLUMNS": "1000"},
    )
    assert result.exit_code == 2
    assert "--ledger holds a response of 40 tokens, above --max-length 30" in result.output


def test_what_is_no_ledger_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"step": 1, "data": {}}\n')
    with pytest.raises(PlanError, match="no ledger of the staleness modes"):
        read_ledger_facts(path, 1)
    group = '[0, "uid", 0, [["row", [[0, 40]]]]]'
    for groups, generated in (
        ("[1, 2]", "[null, null]"),
        (f"[{group}, {group}]", "[[0, 2]]"),
        (f"[{group}]", "[[0, null]]"),
        (f"[{group}]", "[3]"),
        ('[[0, "uid", 0, [["row", [[0, "40"]]]]]]', "[[0, 2]]"),
        (f"[{group}]", "null"),
    ):
        path.write_text(f'{{"step": 1, "groups": {groups}, "generated": {generated}}}\n')
        with pytest.raises(PlanError, match=r"no ledger of the staleness modes .*; give the file"):
            read_ledger_facts(path, 1)
    path.write_text("")
    with pytest.raises(PlanError, match="holds no trained group"):
        read_ledger_facts(path, 1)


def test_a_run_and_its_ledger_are_enough(tmp_path):
    log = logged(tmp_path, "sync")
    options = ["--ledger", str(ledger(tmp_path)), "--simulate-steps", "3", "--max-staleness", "4", "--json"]
    result = CliRunner().invoke(app, ["plan", str(log), *options])
    assert result.exit_code == 0, result.output
    sync = next(each for each in json.loads(result.output)["settings"] if each["mode"] == "sync")
    # 20 tokens/s a server, whatever it is given: 11 of the 32 responses of 40 tokens; training, and the push.
    assert sync["step_s_mean"] == pytest.approx(11 * 2.0 + 8 + 1)


def test_every_fact_that_is_needed_has_an_option():
    assert set(SUPPLIES) <= set(vars(Facts()))
    with pytest.raises(PlanError) as raised:
        Facts().require_whole("")
    assert all(option in str(raised.value) for option in SUPPLIES.values())


def test_splits_and_stalenesses():
    assert stalenesses("bounded_async", 6) == [0, 1, 2, 4, 6]
    assert stalenesses("sync", 6) == [0]
    assert splits(16, 4, [0.1, 0.5, 0.9]) == [4, 8, 12]


def test_the_front_is_those_that_no_other_beats():
    class Point:
        def __init__(self, seconds, age):
            self.outcome = self
            self.mean_step_s, self.mean_age = seconds, age
            self.mean_age_updates = age

    points = [Point(1.0, 8.0), Point(1.01, 4.0), Point(2.0, 4.0), Point(3.0, 0.0)]
    assert pareto(points) == [points[0], points[1], points[3]]  # pyright: ignore
    assert recommend(points, None, None, 10) is points[1]  # pyright: ignore
    assert recommend(points, 3.0, None, 10) is points[3]  # pyright: ignore
