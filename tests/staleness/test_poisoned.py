"""Prompts that kill what generates them stay set aside over crashes, and no other prompt is."""

import pytest
from omegaconf import OmegaConf

from verl_m2po.staleness.account.ledger import TrainedRowsLedger
from verl_m2po.staleness.heal.poisoned import PoisonedPrompts
from verl_m2po.staleness.rule.events import Failed
from verl_m2po.staleness.rule.records import GroupReport, Ticket


def set_aside(prompts: PoisonedPrompts, index: int | str) -> None:
    ticket = Ticket("g", 0, dispatch_version=0, lot=0, prompt_index=index)
    prompts.on_event(Failed(ticket, GroupReport("g", (), "ServerDied: it died", was_lost=True, deaths=2)))


@pytest.mark.parametrize(("before", "cut_off", "name"), [(7, "12", 345), ("a", '"train/1', "train/2")])
def test_what_a_crash_cut_off_makes_no_other_name_of_the_next(tmp_path, before, cut_off, name):
    path = tmp_path / "poisoned.jsonl"
    set_aside(PoisonedPrompts(path), before)
    with path.open("a") as file:
        file.write(cut_off)
    set_aside(PoisonedPrompts(path), name)
    again = PoisonedPrompts(path)
    assert again.has(before) and again.has(name)
    assert not again.has(12) and not again.has(12345)


def test_a_line_that_is_no_json_is_named_and_left_out(tmp_path, caplog):
    path = tmp_path / "poisoned.jsonl"
    path.write_text("7\nseven\n8\n")
    prompts = PoisonedPrompts(path)
    assert prompts.has(7) and prompts.has(8)
    assert f"{path}: line 2 is no JSON" in caplog.text


@pytest.mark.parametrize(("val_only", "is_kept"), [(True, True), (False, False)])
def test_a_validation_of_the_base_model_forgets_nothing_of_the_training_in_that_folder(tmp_path, val_only, is_kept):
    set_aside(PoisonedPrompts(tmp_path / "poisoned.jsonl"), 7)
    trainer = {"default_local_dir": str(tmp_path), "resume_mode": "disable", "val_only": val_only}
    PoisonedPrompts.of(OmegaConf.create({"trainer": trainer}))
    assert PoisonedPrompts(tmp_path / "poisoned.jsonl").has(7) is is_kept


def test_a_full_disk_is_an_error_that_names_the_file_and_what_to_do(tmp_path):
    prompts, lines = PoisonedPrompts(tmp_path / "poisoned.jsonl"), TrainedRowsLedger(str(tmp_path / "ledger.jsonl"))
    for name, write in (
        ("poisoned.jsonl", lambda: set_aside(prompts, 1)),
        ("ledger.jsonl", lambda: lines.resumed(0)),
    ):
        path = tmp_path / name
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/full")
        with pytest.raises(OSError, match=rf"No space left on device; make room .*{path}"):
            write()
