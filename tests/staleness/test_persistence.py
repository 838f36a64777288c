"""A run is saved whole or not at all, with verl's half written where ours is, and comes back as it was."""

import json
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from verl_m2po.staleness.account.ledger import TrainedRowsLedger
from verl_m2po.staleness.prompts import require_a_batch
from verl_m2po.staleness.restart.checkpoint import CheckpointError, Checkpoints, flaws
from verl_m2po.staleness.restart.persistence import Persistence
from verl_m2po.staleness.rule import events

STATE = {"state_version": 2}


class SavedTo:
    """A user's `trainer.checkpoint_callback_class`."""

    def __init__(self) -> None:
        self.folders = []

    def on_save(self, checkpoint_dir, global_step, **_kwargs):
        assert flaws(Checkpoints(checkpoint_dir).root) == []
        self.folders.append(checkpoint_dir)


@pytest.fixture
def trainer(tmp_path):
    """What saving asks of verl's trainer."""
    config = OmegaConf.create({"trainer": {"default_local_dir": str(tmp_path), "max_actor_ckpt_to_keep": 2}})
    OmegaConf.set_struct(config, True)
    return SimpleNamespace(config=config, global_steps=0, use_critic=False, checkpoint_callback=SavedTo())


def verls_half(trainer):
    """Writes one file and verl's pointer, where verl's configuration says, and calls the callback as verl does."""

    def save():
        root = trainer.config.trainer.default_local_dir
        assert trainer.config.trainer.max_actor_ckpt_to_keep is None
        with open(f"{root}/global_step_{trainer.global_steps}/data.pt", "w") as file:
            file.write("position")
        with open(f"{root}/latest_checkpointed_iteration.txt", "w") as file:
            file.write(str(trainer.global_steps))
        trainer.checkpoint_callback.on_save(trainer=trainer, global_step=trainer.global_steps, checkpoint_dir=root)

    return save


def save(persistence, trainer, step, half=None) -> None:
    trainer.global_steps = step
    persistence.save(trainer, STATE, half if half is not None else verls_half(trainer))


def test_verl_writes_beside_and_its_settings_are_as_they_were(trainer, tmp_path):
    before, persistence = OmegaConf.to_container(trainer.config), Persistence(Checkpoints(tmp_path), {"a": 1})
    for step in (2, 4, 6):
        save(persistence, trainer, step)
    assert OmegaConf.to_container(trainer.config) == before
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [4, 6], "max_actor_ckpt_to_keep=2 keeps two whole checkpoints"
    assert all(flaws(checkpoints.folder(step)) == [] for step in (4, 6))
    assert checkpoints.latest() == tmp_path / "global_step_6"
    assert persistence.saved_step == 6
    assert trainer.checkpoint_callback.folders == [str(tmp_path / f"global_step_{step}") for step in (2, 4, 6)]
    state = json.loads((tmp_path / "global_step_6" / "staleness.json").read_text())
    assert state["settings"] == {"a": 1} and state["random_states"].keys() == {"python", "numpy", "torch"}


def test_verl_without_checkpoint_callbacks(trainer, tmp_path):
    """As in verl 0.9.0, whose trainer has no such attribute."""
    del trainer.checkpoint_callback
    save(Persistence(Checkpoints(tmp_path), {}), trainer, 2)
    assert Checkpoints(tmp_path).steps() == [2]


def test_when_verls_half_fails_nothing_has_changed(trainer, tmp_path):
    persistence = Persistence(Checkpoints(tmp_path), {})
    save(persistence, trainer, 2)
    before = OmegaConf.to_container(trainer.config)

    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step 4 could not .*No space left .*global_step_2 is untouched"):
        save(persistence, trainer, 4, full)
    assert OmegaConf.to_container(trainer.config) == before and persistence.saved_step == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_2", "latest_checkpointed_iteration.txt"]


class NoRollouts:
    """What restoring a run without a checkpoint asks of the buffer."""

    rule = SimpleNamespace(in_flight_tickets=list)
    backlog = SimpleNamespace(replay=lambda *_: None)

    def begin(self, version):
        assert version == 0


def accounts(tmp_path, **trainer):
    """Starts a run anew that keeps a journal and a ledger, and returns what its ledger has."""
    section = {"journal": True, "ledger_path": str(tmp_path / "ledger.jsonl")}
    run = {"default_local_dir": str(tmp_path), "resume_mode": "disable", "save_freq": -1, **trainer}
    config = OmegaConf.create({"trainer": {**run, "v1": {"trainer_mode": "stale_k", "stale_k": section}}})
    Persistence.open(config).restore(NoRollouts(), config, 0, lambda count: pytest.fail("no prompts are drawn"))
    if (ledger := TrainedRowsLedger.of(config)) is not None:
        ledger.on_event(events.Resumed(0))
    return (tmp_path / "ledger.jsonl").read_text().splitlines()


def test_a_start_that_only_validates_takes_nothing_from_the_accounts_of_the_training(tmp_path):
    accounts(tmp_path)
    before = {path.name: path.read_text() for path in (tmp_path / "journal").iterdir()}
    assert len(accounts(tmp_path, val_only=True)) == 1
    assert {path.name: path.read_text() for path in (tmp_path / "journal").iterdir()} == before
    assert len(accounts(tmp_path, val_only=True, val_before_train=False)) == 2, "verl trains then"
    assert {path.name: path.read_text() for path in (tmp_path / "journal").iterdir()} != before


def test_a_training_set_smaller_than_a_batch_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"7 prompts, fewer than data.train_batch_size=8\. Lower it.*data.train_files"):
        require_a_batch(7, 8)
    require_a_batch(8, 8)
