"""Is the data of a run there, is it what verl needs, and is it enough for the run?"""

import glob
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig

from verl_m2po.ground.problem import Problem, WrongValue
from verl_m2po.ground.settings import Number, Text
from verl_m2po.ground.verl_config import read
from verl_m2po.launch.checks.model import is_remote
from verl_m2po.staleness.checks.numbers import PROMPT_LENGTH, TRAIN_BATCH_SIZE

TRAIN, VALIDATION = "data.train_files", "data.val_files"
MAX_SAMPLES = {
    TRAIN: Number("data.train_max_samples", -1, may_be_null=True, default=-1, meaning="rows to take, -1 for all"),
    VALIDATION: Number("data.val_max_samples", -1, may_be_null=True, default=-1, meaning="rows to take, -1 for all"),
}
PROMPT_KEY = Text("data.prompt_key", "the column of the prompts", default="prompt")
FILTER = "data.filter_overlong_prompts"
CUSTOM_DATASET = "data.custom_cls.path"


class Table(NamedTuple):
    """What the footer of a parquet file says.

    Args:
        rows: Their number.
        columns: Their names.
    """

    rows: int
    columns: tuple[str, ...]


def exist(config: DictConfig, key: str) -> Iterator[Problem]:
    """Yield every file of `key` that is not there; what a data set class of the user's reads is its own affair."""
    if is_custom(config):
        return
    for entry in dict.fromkeys(_entries(config, key)):
        if any(is_remote(file) or Path(file).expanduser().is_file() for file in _matched(entry)):
            continue
        if Path(entry).expanduser().is_file():
            why = "verl reads it with `datasets`, to which *, ? and [ in a path are a pattern, and it matches no file"
            yield Problem(key, entry, why, "Rename the file or the folder")
        else:
            yield Problem(key, entry, "there is no such file", "Write it with `python -m verl_m2po.tasks --help`")


def columns(config: DictConfig, key: str) -> Iterator[Problem]:
    """Yield every file of `key` that is no parquet, or lacks a column that verl will read."""
    if is_custom(config):
        return
    needed = _columns(config)
    for path in dict.fromkeys(_local_tables(config, key)):
        yield from _lacks(key, path, needed)


def batch(config: DictConfig) -> Iterator[Problem]:
    """Yield a training set with fewer prompts than a batch: verl fails after everything has started."""
    rows, batch = known_rows(config, TRAIN), TRAIN_BATCH_SIZE.of(config)
    if rows is not None and rows < batch:
        yield Problem(
            TRAIN_BATCH_SIZE.key,
            batch,
            f"the training set has {rows} prompts, fewer than a batch, so not one step could be trained",
            f"Lower it, with actor_rollout_ref.actor.ppo_mini_batch_size, or give {TRAIN} more prompts",
        )


def validation(config: DictConfig) -> Iterator[Problem]:
    """Yield a validation set without rows."""
    if known_rows(config, VALIDATION) == 0:
        why = "the files have no rows, and verl validates on them"
        yield Problem(VALIDATION, read(config, VALIDATION), why, "Name files that have some")


def overlong(config: DictConfig) -> Iterator[Problem]:
    """Warn where prompts may be cut: verl's agent loop does that from the left, whatever `data.truncation` says."""
    if is_custom(config) or read(config, FILTER):
        return
    limit, column = PROMPT_LENGTH.of(config), PROMPT_KEY.of(config)
    longest = max((_longest_message_bytes(path, column) for path in _local_tables(config, TRAIN)), default=0)
    # A byte-level tokenizer makes at most one token of a byte.
    if longest > limit:
        yield Problem(
            FILTER,
            False,
            f"the longest training prompt has {longest} bytes, and of one that has more than {PROMPT_LENGTH.key}="
            f"{limit} tokens verl cuts off the beginning and trains on the rest",
            f"Set it to true, which leaves such prompts out, or raise {PROMPT_LENGTH.key}",
            is_fatal=False,
        )


def is_custom(config: DictConfig) -> bool:
    """Whether a data set class of the user's reads `data.train_files`, which may then name anything."""
    return read(config, CUSTOM_DATASET) is not None


def known_rows(config: DictConfig, key: str) -> int | None:
    """Rows of the data set before long prompts are filtered out; None where its files do not say so by themselves."""
    if is_custom(config):
        return None
    tables = list(_local_tables(config, key))
    if not tables or len(tables) < len(files(config, key)):
        return None
    rows = sum(table_of(key, path).rows for path in tables)
    most = MAX_SAMPLES[key].of(config)
    return min(rows, most) if most is not None and most > 0 else rows


def has_column(config: DictConfig, name: Any) -> bool:
    """Whether a training file that is on this machine has a column `name`; a broken file has none."""
    try:
        return any(name in table_of(TRAIN, path).columns for path in _local_tables(config, TRAIN))
    except WrongValue:
        return False  # said by `columns`


def files(config: DictConfig, key: str) -> list[str]:
    """What `data.train_files` or `data.val_files` names, in order; a file may stand several times, to weigh more."""
    return [file for entry in _entries(config, key) for file in _matched(entry)]


def _matched(entry: str) -> list[str]:
    """The files of one entry as `datasets` finds them, with which verl reads: a local one is a pattern."""
    if is_remote(entry) or glob.escape(entry) == entry:
        return [entry]
    return sorted(path for path in glob.glob(entry, recursive=True) if Path(path).is_file())


def _entries(config: DictConfig, key: str) -> list[str]:
    found = read(config, key)
    if found is None:
        return []
    entries: list[Any] = list(found) if isinstance(found, ListConfig | list) else [found]
    for entry in entries:
        if not isinstance(entry, str):
            raise WrongValue(Problem(key, found, f"{entry!r} is no path", "Name a file, or a list of files"))
    return entries


def table_of(key: str, path: Path) -> Table:
    """The footer of a parquet file.

    Raises:
        WrongValue: the file is none.
    """
    import pyarrow

    try:
        return _footer(path, path.stat().st_mtime_ns)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise WrongValue(Problem(key, path, f"the file is not valid parquet ({reason})", "Write it again")) from error


@cache
def _footer(path: Path, _changed_ns: int) -> Table:
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    return Table(metadata.num_rows, tuple(metadata.schema.to_arrow_schema().names))


def _local_tables(config: DictConfig, key: str) -> Iterator[Path]:
    for file in files(config, key):
        path = Path(file).expanduser()
        if not is_remote(file) and path.suffix == ".parquet" and path.is_file():
            yield path


def _columns(config: DictConfig) -> list[str]:
    """What verl's data set and, where it is one of verl's that judges by an answer, the reward read of a row."""
    own_function = read(config, "reward.custom_reward_function.path") is not None
    own_manager = read(config, "reward.reward_manager.source", "register") != "register"
    # A reward model reads the conversation only.
    judged_by_model = bool(read(config, "reward.reward_model.enable")) and not own_function
    return [PROMPT_KEY.of(config), *(() if own_manager or judged_by_model else ("data_source", "reward_model"))]


def _lacks(key: str, path: Path, needed: list[str]) -> Iterator[Problem]:
    try:
        columns = table_of(key, path).columns
    except WrongValue as wrong:
        yield wrong.problem
        return
    missing = [column for column in needed if column not in columns]
    if missing:
        yield Problem(
            key,
            path,
            f"it lacks the column(s) {', '.join(missing)}; it has {', '.join(columns)}",
            f"Write it with `python -m verl_m2po.tasks`, set {PROMPT_KEY.key}, or add them as verl's documentation "
            "describes",
        )


def _longest_message_bytes(path: Path, column: str) -> int:
    """Bytes of the longest message in a column of conversations; 0 where it holds something else."""
    import pyarrow
    from pyarrow import compute, parquet

    if column not in table_of(TRAIN, path).columns:
        return 0
    messages = parquet.read_table(path, columns=[column]).column(column)
    longest = 0
    for chunk in messages.chunks:
        if not pyarrow.types.is_list(chunk.type) or not pyarrow.types.is_struct(chunk.type.value_type):
            return 0
        texts = chunk.flatten()
        if texts.type.get_field_index("content") < 0 or not pyarrow.types.is_string(texts.type.field("content").type):
            return 0
        lengths = compute.binary_length(texts.field("content"))  # pyright: ignore[reportAttributeAccessIssue]
        longest = max(longest, compute.max(lengths).as_py() or 0)  # pyright: ignore[reportAttributeAccessIssue]
    return longest
