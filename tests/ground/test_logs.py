"""A resumed run does not erase the log of the attempt before."""

import logging
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from verl.utils.tracking import FileLogger

from verl_m2po.ground import logs

CONFIG = OmegaConf.create({"trainer": {"logger": ["console", "file"], "project_name": "p", "experiment_name": "e"}})


@pytest.fixture(params=["path", "root"])
def environment(request, tmp_path, monkeypatch):
    """verl's two ways to say where the log goes."""
    monkeypatch.delenv("VERL_FILE_LOGGER_PATH", raising=False)
    monkeypatch.setenv("VERL_FILE_LOGGER_ROOT", str(tmp_path))
    if request.param == "path":
        monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))


def test_every_attempt_keeps_its_log(environment):
    for attempt in range(3):
        logs.keep_earlier(logs.path_of(CONFIG))
        logger = FileLogger("p", "e")
        logger.log({"attempt": attempt}, step=attempt)
        logger.finish()
    path = logs.path_of(CONFIG)
    assert path == (type(path)(logger.filepath))
    kept = [path.with_name(f"{path.stem}.attempt-{number}.jsonl") for number in (1, 2)]
    assert [f'"attempt":{attempt}' in p.read_text() for attempt, p in enumerate([*kept, path])] == [True] * 3
    assert len(list(path.parent.iterdir())) == 3


def test_an_attempt_comes_after_all_that_are_left(environment):
    path = logs.path_of(CONFIG)
    path.parent.mkdir(exist_ok=True)
    for others in (
        f"{path.stem}.attempt-9.jsonl.part",
        f"a{path.stem}.attempt-8.jsonl",
        f"{path.stem}.attempt-x.jsonl",
    ):
        (path.parent / others).touch()
    path.with_name(f"{path.stem}.attempt-2.jsonl").write_text("earlier")
    path.write_text("later")
    assert logs.keep_earlier(path) == path.with_name(f"{path.stem}.attempt-3.jsonl")
    assert path.with_name(f"{path.stem}.attempt-3.jsonl").read_text() == "later" and not path.exists()


def test_nothing_is_moved_where_nothing_is_lost(environment, tmp_path):
    assert logs.keep_earlier(logs.path_of(CONFIG)) is None
    path = logs.path_of(CONFIG)
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    assert logs.keep_earlier(path) is None
    without = OmegaConf.create({"trainer": {"logger": "console"}})
    assert logs.path_of(without) is None and logs.keep_earlier(None) is None


def test_messages_go_where_verls_go_once_verl_has_set_that_up(monkeypatch):
    verls, ours = logging.Logger("verl"), logging.Logger("verl_m2po")
    loggers = SimpleNamespace(getLogger={"verl": verls, "verl_m2po": ours}.get)
    monkeypatch.setattr(logs, "logging", loggers)
    logs.follow_verl()
    assert ours.propagate and not ours.handlers, "nothing is set up here"
    verls.handlers, verls.propagate = [logging.NullHandler()], False
    verls.setLevel(logging.WARNING)
    logs.follow_verl()
    assert ours.handlers == verls.handlers and not ours.propagate and ours.level == logging.WARNING
