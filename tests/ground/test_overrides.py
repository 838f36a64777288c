"""Whatever a path or name is, Hydra reads it back, and ordinary ones stay as they are."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st

from verl_m2po.ground.overrides import override

KEY = "hydra.run.dir"
# All that Hydra's grammar knows by name, so that they meet
GRAMMAR = st.text(alphabet="'\"\\ \t,:=()[]{}$/~*?@|.-+_aé0")


def read_back(word: str):
    parsed = OverridesParser.create().parse_override(word)
    assert parsed.key_or_group == KEY and not parsed.is_sweep_override()
    return parsed.value()


@given(st.text() | GRAMMAR)
@example("/tmp/a'b\\")
@example("a,b")
@example("null")
@example("1e3")
@example("glob(*)")
@example("")
@example("/tmp/caf\udce9")
def test_what_is_written_is_read_back(text):
    assert read_back(override(KEY, text)) == text


@pytest.mark.parametrize("text", ["/home/user/outputs/m2po-seed1/hydra", "m2po_stale_k_s256", "with space"])
def test_what_needs_no_quotes_has_none(text):
    assert override(KEY, text) == f"{KEY}={text}"


@pytest.mark.parametrize("folder", ["josé", "a(b)", "a=b", "a'b", "[x]", "a,b", "{c: d}", "ends with \\"])
def test_folders_that_hydra_would_read_as_something_else(tmp_path, folder):
    assert read_back(override(KEY, tmp_path / folder)) == str(tmp_path / folder)
