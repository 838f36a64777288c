"""A checkpoint is whole or absent, wherever the writing stops; what is broken is named before anything is loaded."""

import errno
import io
import json
import os
import shutil

import pytest

from verl_m2po.staleness.restart import checkpoint
from verl_m2po.staleness.restart.checkpoint import INCOMPLETE, MANIFEST, POINTER, CheckpointError, Checkpoints, flaws

FILES = ("actor/model_world_size_1_rank_0.pt", "actor/optim_world_size_1_rank_0.pt", "data.pt", "staleness.json")

WRITES = (
    *((os, name) for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir", "open")),
    (io, "open"),
)
"""Every way in which a checkpoint changes what is on disk."""


@pytest.fixture(autouse=True)
def no_real_fsync(monkeypatch):
    """It is counted as a write, and slow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Killed(BaseException):
    """The process ends here: no handler of Exception runs."""


def content(step: int, name: str) -> bytes:
    return f"{name} of step {step}\n".encode() * 50


def write(checkpoints: Checkpoints, step: int, resumed_from=None) -> None:
    with checkpoints.writing(step, resumed_from) as incomplete:
        for name in FILES:
            path = incomplete / f"global_step_{step}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content(step, name))


def assert_is_checkpoint_of(folder, step: int) -> None:
    assert folder.name == f"global_step_{step}" and flaws(folder) == []
    assert all((folder / name).read_bytes() == content(step, name) for name in FILES)


class Failing:
    """Raises at the `at`-th write, and counts them."""

    def __init__(self, monkeypatch, at: int, error: BaseException) -> None:
        self.calls = 0
        for module, name in WRITES:
            monkeypatch.setattr(module, name, self._wrap(getattr(module, name), at, error))

    def _wrap(self, function, at: int, error: BaseException):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == at:
                raise error
            return function(*args, **kwargs)

        return call


def prepared(tmp_path, rewound: bool):
    """A run with checkpoint 2, or one rewound from 4 to 2: (folder, steps, resumed from)."""
    root = tmp_path / "checkpoints"
    shutil.rmtree(root, ignore_errors=True)
    checkpoints = Checkpoints(root)
    write(checkpoints, 2)
    if rewound:
        write(checkpoints, 4)
        return root, {2, 4}, checkpoints.folder(2)
    return root, {2}, None


def stopped_at_every_write(tmp_path, monkeypatch, error: BaseException, rewound: bool):
    """Yield what is left when writing the checkpoint of step 4 stops at its first, second, ... write."""
    at = 0
    while True:
        at += 1
        root, old, resumed_from = prepared(tmp_path, rewound)
        raised = None
        with monkeypatch.context() as patch:
            failing = Failing(patch, at, error)
            try:
                write(Checkpoints(root), 4, resumed_from)
            except (Killed, CheckpointError) as error_raised:
                raised = error_raised
        if failing.calls < at:
            assert at > 20, "hardly anything was written"
            return
        yield Checkpoints(root), old, raised


@pytest.mark.parametrize("rewound", [False, True])
def test_killed_at_any_write_the_old_or_the_new_checkpoint_is_there(tmp_path, monkeypatch, rewound):
    seen = set()
    for checkpoints, old, _ in stopped_at_every_write(tmp_path, monkeypatch, Killed(), rewound):
        latest = checkpoints.latest()
        step = int(latest.name.rsplit("_", 1)[1])
        assert step in {*old, 4}
        assert_is_checkpoint_of(latest, step)
        seen.add(step)
        write(checkpoints, 4)  # and the next attempt gets through
        assert_is_checkpoint_of(checkpoints.latest(), 4)
        assert not (checkpoints.root / INCOMPLETE).exists()
    assert seen == {2, 4}


def test_a_full_disk_at_any_write_ends_in_one_clear_error(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for checkpoints, _, raised in stopped_at_every_write(tmp_path, monkeypatch, full, rewound=False):
        if raised is None:  # what was left to do was tidying up
            assert_is_checkpoint_of(checkpoints.latest(), 4)
            continue
        assert "checkpoint after trainer step 4 could not be written" in str(raised)
        assert "No space left on device" in str(raised)
        step = int(checkpoints.latest().name.rsplit("_", 1)[1])
        assert_is_checkpoint_of(checkpoints.latest(), step)
        assert f"global_step_{step} is untouched" in str(raised)


def test_what_a_worker_raises_through_ray_is_the_reason(tmp_path):
    class RayLike(Exception):
        cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    words = r"OSError: .*No space left on device.*There is no earlier checkpoint"
    with pytest.raises(CheckpointError, match=words), Checkpoints(tmp_path).writing(1):
        raise RayLike("a traceback of\nmany lines")
    assert Checkpoints(tmp_path).latest() is None


@pytest.mark.parametrize("name", FILES)
def test_truncated_foreign_and_missing_files_are_named(tmp_path, name):
    checkpoints = Checkpoints(tmp_path)
    for step in (2, 4):
        write(checkpoints, step)
    newest, path = checkpoints.folder(4), checkpoints.folder(4) / name
    advice = f"Whole are: global_step_2. To go on .*resume_path trainer.resume_from_path={checkpoints.folder(2)}"
    good = path.read_bytes()
    path.write_bytes(good[:-7])
    with pytest.raises(CheckpointError, match=rf"{name} has {len(good) - 7} bytes, {len(good)} were written.*{advice}"):
        checkpoints.require_whole(newest)
    shutil.copy(checkpoints.folder(2) / name, path)
    with pytest.raises(
        CheckpointError, match=rf"{name} is not the file that was written: its sha256 differs.*{advice}"
    ):
        checkpoints.require_whole(newest)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        checkpoints.require_whole(newest)
    path.write_bytes(good)
    (newest / "notes.txt").write_text("mine")
    checkpoints.require_whole(newest)


def test_a_foreign_or_broken_manifest_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (2, 4):
        write(checkpoints, step)
    manifest = checkpoints.folder(4) / MANIFEST
    text = manifest.read_text()
    manifest.write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match=f"{MANIFEST} cannot be read"):
        checkpoints.require_whole(checkpoints.folder(4))
    shutil.copy(checkpoints.folder(2) / MANIFEST, manifest)
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is that of global_step_2"):
        checkpoints.require_whole(checkpoints.folder(4))
    manifest.unlink()
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is missing"):
        checkpoints.require_whole(checkpoints.folder(4))


def test_large_files_are_hashed_in_blocks_that_find_another_file(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WHOLE_HASH_BYTES", 1000)
    monkeypatch.setattr(checkpoint, "BLOCKS", 4)
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 100)
    path = tmp_path / "shard"
    data = bytearray(os.urandom(2000))
    path.write_bytes(data)
    whole = checkpoint.fingerprint(path)
    for position in (0, 99, 1900, 1999, 650):
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert checkpoint.fingerprint(path) != whole, position


@pytest.mark.parametrize("text", ["", "4\x00", "latest", "-2", "9" * 5000, "\u0664", "2 4"])
def test_a_pointer_that_is_no_step_is_named(tmp_path, text):
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 2)
    (tmp_path / POINTER).write_text(text)
    with pytest.raises(CheckpointError, match=f"{POINTER} holds .*not a trainer step. Whole are: global_step_2"):
        checkpoints.latest()


def test_a_pointer_to_nothing_does_not_start_from_scratch(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 2)
    (tmp_path / POINTER).write_text("4")
    with pytest.raises(CheckpointError, match=r"global_step_4, which is not there. Whole are: global_step_2"):
        checkpoints.latest()


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"default_local_dir=.*no checkpoint can be written there"):
        Checkpoints(tmp_path / "file").require_writable()
    Checkpoints(tmp_path / "new" / "folder").require_writable()


def test_the_oldest_checkpoints_are_deleted_whole_and_nobody_elses(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / "global_step_1").mkdir()  # verl's own, without a manifest
    for step in (2, 4, 6, 8):
        write(checkpoints, step)
    checkpoints.prune(6, keep=None)
    assert checkpoints.steps() == [1, 2, 4, 6, 8]
    checkpoints.prune(6, keep=2)
    assert checkpoints.steps() == [1, 4, 6, 8], "8 is of a run that was rewound"
    assert json.loads((checkpoints.folder(4) / MANIFEST).read_text())["step"] == 4


def rewritten(checkpoints: Checkpoints, step: int, change) -> None:
    """Change the manifest of a checkpoint."""
    path = checkpoints.folder(step) / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: manifest["files"]["data.pt"].pop("bytes"), "its entry for data.pt lacks bytes or sha256"),
        (lambda manifest: manifest["files"].update({"data.pt": None}), "its entry for data.pt lacks"),
        (lambda manifest: manifest.update(files={}), "it lists no file"),
        (lambda manifest: manifest.update(files=[]), "it lists no file"),
        (lambda manifest: manifest.update(step="x"), "is that of global_step_x"),
    ],
)
def test_a_manifest_that_says_nothing_of_a_file_is_no_whole_checkpoint(tmp_path, change, words):
    checkpoints = Checkpoints(tmp_path)
    for step in (2, 4):
        write(checkpoints, step)
    rewritten(checkpoints, 4, change)
    with pytest.raises(CheckpointError, match=f"{words}.*Whole are: global_step_2"):
        checkpoints.require_whole(checkpoints.folder(4))


def test_a_file_with_the_name_of_a_checkpoint_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 2)
    (tmp_path / "global_step_5").write_text("")
    assert checkpoints.steps() == [2]
    (tmp_path / POINTER).write_text("5")
    with pytest.raises(CheckpointError, match=r"names .*global_step_5, which is not there. Whole are: global_step_2"):
        checkpoints.latest()
    assert flaws(tmp_path / "global_step_5") == [
        "manifest.json cannot be read (NotADirectoryError: [Errno 20] "
        f"Not a directory: '{tmp_path}/global_step_5/manifest.json')"
    ]
    write(checkpoints, 5)
    assert_is_checkpoint_of(checkpoints.latest(), 5)
    checkpoints.prune(5, keep=1)
    assert checkpoints.steps() == [5]


def test_a_pointer_that_is_a_folder_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 2)
    (tmp_path / POINTER).unlink()
    (tmp_path / POINTER).mkdir()
    with pytest.raises(CheckpointError, match=f"{POINTER} cannot be read .*Whole are: global_step_2"):
        checkpoints.latest()
