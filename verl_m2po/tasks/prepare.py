"""Turn the rows of a public data set into parquet files for verl.

Every row is checked with the scorer that will judge the responses: a row whose own answer verl would not score as right
can teach nothing, so it is set aside and listed.
"""

import difflib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from verl_m2po.tasks import parquet, scoring
from verl_m2po.tasks.sets import DATA_SETS, DataSet, UnusableRow

# `datasets` builder for each file ending that a source may have.
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# Answers that are checked at the same time; math-verify works in four processes of verl's.
CHECKS_AT_ONCE = 8

OnRow = Callable[[int, int], None]


@dataclass(frozen=True)
class Unusable:
    """A row that was left out.

    Args:
        index: Position in the source, from 0.
        reason: Why.
        question: The question, for finding it again; empty where there is none.
    """

    index: int
    reason: str
    question: str


@dataclass(frozen=True)
class Prepared:
    """What became of one split.

    Args:
        path: The parquet file, or None if no row was usable.
        split: ``train`` or ``test``.
        rows: Rows in the file.
        unusable: Rows that are not in it.
        unusable_path: A JSON lines file that lists them; None if there are none.
    """

    path: Path | None
    split: str
    rows: int
    unusable: tuple[Unusable, ...]
    unusable_path: Path | None


def find(name: str) -> DataSet:
    """The data set called `name`.

    Raises:
        ValueError: There is none; the message has the nearest names.
    """
    if name in DATA_SETS:
        return DATA_SETS[name]
    near = difflib.get_close_matches(name, DATA_SETS, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown data set {name!r}. {hint}Known: {', '.join(DATA_SETS)}.")


def prepare(
    name: str, out: Path, *, source: Path | None = None, on_row: Callable[[str, int, int], None] | None = None
) -> list[Prepared]:
    """Write each split of the data set `name` as ``<split>.parquet`` into the folder `out`.

    Args:
        name: A key of `sets.DATA_SETS`.
        out: Folder, made where it is missing. Each split with unusable rows gets an ``<split>.unusable.jsonl`` as well.
        source: A file (JSON lines, JSON, parquet, CSV) or a folder with one per split; None loads it from the hub.
        on_row: Called with the split, the rows done and their number, after each row; None for silence.

    Raises:
        ValueError: Unknown name, or the source lacks a column, a split, or cannot be read.
        FileNotFoundError: `source` does not exist.
        ConnectionError: The hub could not be reached.
        RuntimeError: The scorer that the data set needs does not work.
        OSError: `out` cannot be written to, or already holds another data set's files.
    """
    data_set = find(name)
    tables = _load_local(data_set, Path(source).expanduser()) if source else _load_hub(data_set)
    scoring.start(data_set.data_source)
    report = on_row or (lambda split, done, total: None)
    return [
        _prepare_split(data_set, split, table, Path(out), partial(report, split)) for split, table in tables.items()
    ]


def _prepare_split(data_set: DataSet, split: str, table: Sequence, out: Path, on_row: OnRow) -> Prepared:
    rows: list[parquet.Row] = []
    unusable: list[Unusable] = []
    for index, result in enumerate(_convert_all(data_set, split, table)):
        if isinstance(result, Unusable):
            unusable.append(result)
        else:
            rows.append(result)
        on_row(index + 1, len(table))
    path = parquet.write(rows, out / f"{split}.parquet") if rows else None
    return Prepared(path, split, len(rows), tuple(unusable), _write_unusable(unusable, out / f"{split}.unusable.jsonl"))


def _convert_all(data_set: DataSet, split: str, table: Sequence) -> Iterator[parquet.Row | Unusable]:
    columns = _columns(data_set, table)

    def convert(index: int) -> parquet.Row | Unusable:
        raw = table[index]
        try:
            return to_row(data_set, split, index, raw, *columns)
        except UnusableRow as reason:
            return Unusable(index, str(reason), str(raw[columns[0]] or ""))

    with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
        yield from pool.map(convert, range(len(table)))


def _columns(data_set: DataSet, table: Any) -> tuple[str, str]:
    found = []
    for what, wanted in (("question", data_set.question), ("answer", tuple(data_set.answer))):
        present = [column for column in wanted if column in table.column_names]
        if not present:
            raise ValueError(
                f"{data_set.title} needs a column with the {what} named {' or '.join(map(repr, wanted))}; "
                f"the source has {', '.join(table.column_names)}"
            )
        found.append(present[0])
    return found[0], found[1]


def to_row(
    data_set: DataSet, split: str, index: int, raw: dict, question_column: str, answer_column: str
) -> parquet.Row:
    """One row of a source as a row for verl.

    Args:
        data_set: Where it is from.
        split: ``train`` or ``test``.
        index: Its position in the source.
        raw: Its columns.
        question_column: The column with the question.
        answer_column: The column with the answer.

    Raises:
        UnusableRow: There is no question, no answer, or verl's scorer does not score that answer as right.
    """
    question = str(raw[question_column] or "").strip()
    if not question:
        raise UnusableRow("the question is empty")
    if raw[answer_column] is None:
        raise UnusableRow("the answer is empty")
    ground_truth = data_set.answer[answer_column](raw[answer_column])
    if not scoring.is_right(data_set.data_source, data_set.answered.format(ground_truth), ground_truth):
        raise UnusableRow(f"verl's scorer does not recognise the answer: {ground_truth!r}")
    return parquet.make_row(
        data_source=data_set.data_source,
        content=f"{question} {data_set.instruction}",
        ability="math",
        ground_truth=ground_truth,
        split=split,
        index=index,
        question=question,
        answer=str(raw[answer_column]),
    )


def _write_unusable(unusable: list[Unusable], path: Path) -> Path | None:
    path = path.expanduser().absolute()
    path.unlink(missing_ok=True)
    if not unusable:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(vars(row), ensure_ascii=False) + "\n" for row in unusable]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _load_local(data_set: DataSet, source: Path) -> dict[str, Any]:
    if not source.exists():
        raise FileNotFoundError(f"--source {source} does not exist")
    files = _files_in(data_set, source) if source.is_dir() else {_split_of_file(data_set, source): source}
    return {split: _load_file(path) for split, path in files.items()}


def _files_in(data_set: DataSet, folder: Path) -> dict[str, Path]:
    files = {}
    for split in data_set.splits:
        candidates = [folder / f"{split}{ending}" for ending in BUILDERS if (folder / f"{split}{ending}").is_file()]
        if len(candidates) != 1:
            names = " and ".join(candidate.name for candidate in candidates)
            problem = f"has {names}" if candidates else f"has no {split} file"
            raise ValueError(
                f"--source {folder} {problem}; {data_set.title} needs exactly one of "
                f"{', '.join(split + ending for ending in BUILDERS)}"
            )
        files[split] = candidates[0]
    return files


def _split_of_file(data_set: DataSet, file: Path) -> str:
    if file.suffix not in BUILDERS:
        raise ValueError(f"--source {file} does not end in {', '.join(BUILDERS)}")
    if file.stem in data_set.splits:
        return file.stem
    if len(data_set.splits) == 1:
        return next(iter(data_set.splits))
    raise ValueError(
        f"--source {file} could be any of the splits of {data_set.title}: name it after one "
        f"({', '.join(data_set.splits)}), or pass the folder that holds them"
    )


def _load_file(file: Path) -> Any:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    # The source is on this disk already: no second copy of it stays in the cache of `datasets`.
    with tempfile.TemporaryDirectory() as cache, _quiet_datasets():
        try:
            return datasets.load_dataset(
                BUILDERS[file.suffix], data_files=str(file), split="train", cache_dir=cache, keep_in_memory=True
            )
        except (DatasetGenerationError, ValueError) as error:
            raise ValueError(f"--source {file} cannot be read: {error.__cause__ or error}") from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bar of `datasets` while it reads a local file; downloads keep theirs."""
    import datasets

    if not datasets.are_progress_bars_disabled():
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            datasets.enable_progress_bars()
    else:
        yield


def _load_hub(data_set: DataSet) -> dict[str, Any]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    remedy = f"Fetch {data_set.hub} elsewhere and pass it with --source FILE."
    try:
        return {
            split: datasets.load_dataset(data_set.hub, data_set.config, split=hub_split)
            for split, hub_split in data_set.splits.items()
        }
    except (ConnectionError, DatasetNotFoundError) as error:
        raise ConnectionError(f"{data_set.hub} could not be fetched from the hub: {error}. {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{data_set.hub} on the hub is not as expected: {error}. {remedy}") from error
