"""Tests parse a config file once; nothing may tell that from parsing it each time."""

import yaml
from omegaconf import OmegaConf


def load(path):
    with open(path) as file:
        return OmegaConf.load(file)


def test_what_a_test_changes_is_not_in_the_file_for_the_next(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("key: {inner: 1}\n")
    load(path).key.inner = 2
    assert load(path) == {"key": {"inner": 1}} == OmegaConf.load(path)


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("key: 1\n")
    assert load(path).key == 1
    path.write_text("key: 12\n")
    assert load(path).key == 12


def test_it_is_parsed_once(tmp_path, monkeypatch):
    """Or the others show nothing."""
    path = tmp_path / "config.yaml"
    path.write_text("key: 1\n")
    load(path)
    monkeypatch.setattr(yaml, "load", None)
    assert load(path).key == 1
