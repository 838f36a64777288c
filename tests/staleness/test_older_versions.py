"""What version 0.1 of this package left on disk is resumed from: `written_by_0_1`, made by that version's code.

A run of `ExactStale(1, 2)` that was killed in trainer step 3: its checkpoint is that of step 1, with g2, g4 and g5
waiting and g6 in flight; the journal has g6 and, of weight version 2, g7 finished and g8 in flight.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from verl_m2po.staleness.account.metrics import StalenessMetrics
from verl_m2po.staleness.restart import resume
from verl_m2po.staleness.restart.backlog import Backlog
from verl_m2po.staleness.restart.checkpoint import Checkpoints
from verl_m2po.staleness.restart.journal import Journal
from verl_m2po.staleness.restart.persistence import Persistence
from verl_m2po.staleness.rule.exact import ExactStale
from verl_m2po.staleness.rule.failures import FailureWindow, TooManyFailures
from verl_m2po.staleness.rule.units import UpdateClock

WRITTEN = Path(__file__).parent / "written_by_0_1"


class Store:
    """Where rows would lie, without TransferQueue."""

    def __init__(self) -> None:
        self.rows, self.prompts, self.restored = {}, {}, ()

    def restore(self, tickets, ready):
        self.restored = ([ticket.uid for ticket in tickets], [group.ticket.uid for group in ready])
        return 0

    def put_rows(self, ticket, rows, packed):
        self.rows[ticket.uid] = (rows, packed)

    def put_prompts(self, tickets, prompts):
        self.prompts |= {ticket.uid: prompts for ticket in tickets}


class Buffer:
    """The buffer's part in a restart."""

    def __init__(self) -> None:
        self.rule, self.store = ExactStale(1, 2), Store()
        self.failures, self.metrics = FailureWindow(0.5, 4), StalenessMetrics(UpdateClock(2, 1))
        self.backlog = Backlog(self.rule, self.store)
        self.version = None

    def load_state_dict(self, state, version):
        assert state["state_version"] in resume.STATE_FORMATS and state["version"] == version
        self.failures.load_state_dict(state["failures"])
        self.metrics.load_state_dict(state["metrics"])
        self.rule.load_state_dict(state["rule"])
        self.rule.check_resumable(version)
        self.backlog.restore(state["arrivals"])

    def begin(self, version):
        self.version = version
        for group in self.backlog.arrived(version):
            self.rule.finish(group.ticket.uid, group.rows)


def configuration(root, **journal):
    return OmegaConf.create(
        {
            "data": {"train_batch_size": 2},
            "actor_rollout_ref": {
                "actor": {"ppo_mini_batch_size": 1, "ppo_epochs": 1, "strategy": "fsdp2"},
                "rollout": {"n": 2},
            },
            "trainer": {
                "v1": {"trainer_mode": "stale_k", "stale_k": {"staleness_updates": 2} | journal},
                "default_local_dir": str(root / "checkpoints"),
                "resume_mode": "auto",
                "save_freq": 1,
                "nnodes": 1,
                "n_gpus_per_node": 1,
            },
        }
    )


def draw(groups: int):
    return [7, 8][:groups], {}


def uids(selection) -> list[str]:
    return [group.ticket.uid for group in selection.groups]


@pytest.fixture
def root(tmp_path):
    shutil.copytree(WRITTEN, tmp_path / "run")
    return tmp_path / "run"


def opened(root) -> Persistence:
    config = configuration(root)
    settings = {key: value for key, value in resume.settings_of(config).items() if value is not None}
    folder = resume.find(config.trainer)
    journal = Journal(root / "journal", False, settings)
    return Persistence(Checkpoints(root / "checkpoints"), settings, journal, folder, resume.read_state(folder))


def test_its_checkpoint_is_whole_and_fits(root):
    persistence = opened(root)
    assert persistence.resumed_from == root / "checkpoints" / "global_step_1"
    assert persistence.problems(ranks=1) == [] == resume.problems(configuration(root))


def test_its_run_goes_on_with_what_the_checkpoint_and_the_journal_hold(root):
    persistence, buffer = opened(root), Buffer()
    persistence.restore(buffer, configuration(root), 1, draw)
    assert buffer.store.restored == (["g6"], ["g2", "g4", "g5"])
    assert persistence.saved_step == buffer.version == 1
    assert uids(buffer.rule.select(1, 2)) == ["g2", "g4"]
    assert uids(buffer.rule.select(2, 2)) == ["g5", "g6"], "g6 is of the journal"
    assert buffer.backlog.due_again(2) == ["g8"] and [g.ticket.uid for g in buffer.backlog.arrived(2)] == ["g7"]
    with pytest.raises(TooManyFailures, match="3 of the last 4"):
        for _ in range(2):
            buffer.failures.failed("again")


def test_the_rows_of_its_journal_come_back_bit_by_bit(root):
    persistence, buffer = opened(root), Buffer()
    persistence.restore(buffer, configuration(root), 1, draw)
    rows, packed = buffer.store.rows["g7"]
    assert [(row.key, row.spans) for row in rows] == [("g7_0_0", ((2, 2),)), ("g7_1_0", ((2, 3),))]
    assert torch.equal(packed[1]["packed_response"], torch.arange(3, dtype=torch.int32))
    assert packed[1]["rest"]["extra_fields"] == {"reward_extra_info": {"acc": 0.5}}


def test_what_is_written_now_has_every_key_that_it_had(root):
    """An older version that is gone back to finds what it needs."""
    then = json.loads((WRITTEN / "checkpoints" / "global_step_1" / "staleness.json").read_text())
    buffer = Buffer()
    opened(root).restore(buffer, configuration(root), 1, draw)
    now = buffer.rule.state_dict()
    assert now.keys() == then["rule"].keys() and buffer.metrics.state_dict().keys() == then["metrics"].keys()
    assert buffer.failures.state_dict() == then["failures"]
