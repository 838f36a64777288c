"""A file is replaced at once, or stays as it was."""

import pytest

from verl_m2po.ground.files import replacing, write_durably


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "pointer"
    for text in ("1", "\u00e4"):
        write_durably(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path):
    path = tmp_path / "pointer"
    write_durably(path, "old")
    with pytest.raises(ValueError, match="no"), replacing(path) as beside:
        beside.write_text("half")
        assert path.read_text() == "old"
        raise ValueError("no")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
