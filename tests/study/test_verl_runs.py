"""The study's runs through verl: which, at which learning rate, and that a failed one does not end the others."""

from typer.testing import CliRunner

from staleness_study import __main__ as command
from staleness_study import page as pages
from staleness_study import plan, verl_runs
from staleness_study.results import Result


def test_four_runs_at_each_rate_and_one_that_fails_is_named_at_the_end(tmp_path, monkeypatch):
    began = []

    def run_verl(out, console, conditions, seeds, **settings):
        began.append((out.name, conditions, list(seeds), settings))
        return [f"{out.name}: exit status 1"] if out.name == plan.VERL else []

    monkeypatch.setattr(verl_runs, "run_verl", run_verl)
    result = CliRunner().invoke(command.app, ["verl", "--out", str(tmp_path)])
    assert result.exit_code == 1 and "verl: exit status 1" in result.output
    hot = {"more": ("actor_rollout_ref.actor.optim.lr=0.0003",)}
    assert began == [(plan.VERL, verl_runs.CLAIM, [1], {}), (plan.VERL_HOT, verl_runs.HOT, [1], hot)]


def test_the_learning_rate_is_that_of_the_command(tmp_path):
    run = verl_runs.VerlRun.next_attempt(tmp_path, verl_runs.HOT[0], 1, 120, more=verl_runs.HOT_OVERRIDES)
    words = run.command(tmp_path / "model", tmp_path / "data")
    rates = [word for word in words if word.startswith("actor_rollout_ref.actor.optim.lr=")]
    assert rates[-1:] == list(verl_runs.HOT_OVERRIDES) and "loss=m2po_tapered" in words and "staleness=s256" in words


def test_each_rate_has_its_own_table():
    hot = Result(
        plan.VERL_HOT,
        "grpo",
        256,
        8,
        1,
        "",
        [0, 10, 20],
        [0.3] * 3,
        {"clipped": [0.1] * 2, "second_moment": [1.0] * 2},
        1.0,
    )
    assert "| GRPO, s=256 | 1 | 0.300 |" in "\n".join(pages.through_verl([hot], plan.VERL_HOT))
    assert pages.through_verl([], plan.VERL) == ["Not run yet."]
