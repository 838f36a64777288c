"""Docstrings of settings and comments of YAML are the one source of the page, so they must be complete."""

import importlib.util
import re
from pathlib import Path

import pytest
from composing import ADDED, OUR_CONFIGS, options, primaries

from verl_m2po.config.hydra import GROUPS

REPOSITORY = Path(__file__).parents[2]
FILES = [f"{name}.yaml" for name in primaries()]
FILES += [f"{group}/{option}.yaml" for group in GROUPS for option in options(group)]


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate", REPOSITORY / "docs" / "generate_configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(generator):
    written = generator.PAGE.read_text()
    assert written == generator.page(), "run: python docs/generate_configuration.py"


def test_every_added_key_is_explained(generator):
    added = list(generator.added_settings())
    assert {setting.key for setting in added} == {key for key in ADDED if not key.endswith("._target_")}
    assert not [setting.key for setting in added if not setting.comment]


@pytest.mark.parametrize("file", FILES)
def test_every_key_is_explained(generator, file):
    silent = [s.key for s in generator.settings((OUR_CONFIGS / file).read_text()) if not s.comment]
    assert not silent


@pytest.mark.parametrize("file", FILES)
def test_the_form_is_verls(file):
    """Comments above fields, a blank line before each field or its comment, no comment behind a value."""
    lines = (OUR_CONFIGS / file).read_text().splitlines()
    for number, line in enumerate(lines):
        if not re.match(r"\s*[\w+]+:(\s|$)", line):
            continue
        assert " #" not in line, f"{file}:{number + 1} has a comment behind the value"
        above = number - 1
        while above > 0 and lines[above].lstrip().startswith("#"):
            above -= 1
        assert not lines[above].strip(), f"{file}:{number + 1} has no blank line before it"


@pytest.mark.parametrize("file", FILES)
def test_every_file_says_what_it_is(generator, file):
    assert generator.title((OUR_CONFIGS / file).read_text()).strip()
