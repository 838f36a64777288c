"""What matters of a run is said in a dozen lines after verl's thousand, and its error once more at the end."""

import atexit

import pytest
from compose import composed
from hydra.core.utils import JobReturn, JobStatus
from ray.exceptions import RayTaskError

from verl_m2po.launch import failure
from verl_m2po.launch.callback import PreflightCallback
from verl_m2po.staleness.account.summary import lines, print_summary


@pytest.mark.parametrize(
    ("overrides", "promise"),
    [
        (("staleness=on_policy",), "verl's own"),
        (("staleness=s16",), "exactly 16 optimizer updates (4 trainer steps) old; trainer and rollout share"),
        (("staleness=s16_separate",), "exactly 16 optimizer updates (4 trainer steps) old; rollout on devices"),
        (("staleness=bounded_async",), "at most 32 optimizer updates (8 trainer steps) old; rollout on devices"),
        (("staleness=s0",), "every token on-policy; trainer and rollout share the devices"),
    ],
)
def test_summary_names_mode_age_and_loss(overrides, promise):
    said = dict(lines(composed(*overrides, "algorithm.policy_loss=m2po")))
    assert promise in said["trainer mode"]
    assert said["policy loss"] == "m2po"


def test_summary_does_not_cut_a_path(capsys):
    folder = "/data/" + "x" * 140
    print_summary(composed(f"actor_rollout_ref.model.path={folder}"))
    assert folder in capsys.readouterr().out


RESUMES = ("trainer.save_freq=1", "trainer.resume_mode=auto")


def a_failing_run() -> RayTaskError:
    """What the driver gets of an error in an actor, whose own cause stays where it was."""
    try:
        try:
            raise KeyError("reward_model")
        except KeyError as missing:
            raise RuntimeError("group 7 failed\nand a long story") from missing
    except RuntimeError as error:
        remote = RayTaskError("TaskRunner.run", "ray::TaskRunner.run() (pid=7, ip=10.0.0.1)\n  File ...", error)
    return remote.as_instanceof_cause()


def test_an_error_is_said_with_the_process_it_came_from():
    (line,) = failure.causes(a_failing_run())
    assert line.startswith("RuntimeError: group 7 failed, in ")
    assert "ray::TaskRunner.run() (pid=7" in line


def test_an_error_that_is_its_own_cause_is_said_once():
    try:
        try:
            raise ValueError("no dashboard")
        except ValueError as error:
            raise error from error
    except ValueError as error:
        assert failure.causes(error) == ["ValueError: no dashboard"]


def test_the_first_error_comes_first():
    try:
        try:
            raise OSError("disk is full")
        except OSError as full:
            raise ValueError("no checkpoint") from full
    except ValueError as error:
        assert failure.causes(error) == ["OSError: disk is full", "ValueError: no checkpoint"]


def test_errors_of_all_jobs_are_one_block_at_the_very_end(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("VERL_FILE_LOGGER_ROOT", str(tmp_path))
    registered = []
    monkeypatch.setattr(atexit, "register", registered.append)
    callback = PreflightCallback()
    for name in ("one", "two"):
        callback._config = composed("staleness=s16", f"trainer.experiment_name={name}", *RESUMES)
        ended = JobReturn(status=JobStatus.FAILED)
        ended.return_value = a_failing_run()
        callback.on_job_end(ended)
    assert "failed" not in capsys.readouterr().err, "Hydra's traceback follows"
    (say,) = registered
    say()
    said = capsys.readouterr().err
    assert said.startswith("verl-m2po: 2 runs failed")
    assert said.index("one ended") < said.index("two ended")
    assert said.count("RuntimeError: group 7 failed") == said.count("The same command goes on") == 2


def test_a_run_that_ends_well_says_nothing(monkeypatch):
    monkeypatch.setattr(atexit, "register", lambda _: pytest.fail("nothing failed"))
    callback = PreflightCallback()
    callback._config = composed("staleness=s16")
    callback.on_job_end(JobReturn(status=JobStatus.COMPLETED))
