"""Write and check the parquet files that verl's ``RLHFDataset`` reads.

Every task and data set of this package shares one schema, because verl concatenates the files that it is given and
``datasets.concatenate_datasets`` refuses files whose nested columns differ.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from verl_m2po.ground.files import replacing

SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [("split", pa.string()), ("index", pa.int64()), ("question", pa.string()), ("answer", pa.string())]
            ),
        ),
    ]
)


class Row(TypedDict):
    """One prompt in the columns of `SCHEMA`."""

    data_source: str
    prompt: list[dict[str, str]]
    ability: str
    reward_model: dict[str, str]
    extra_info: dict[str, str | int]


def make_row(
    *,
    data_source: str,
    content: str,
    ability: str,
    ground_truth: str,
    split: str,
    index: int,
    question: str,
    answer: str,
) -> Row:
    """One row for verl: a single user message, a rule-based reward, and where it came from.

    Args:
        data_source: What verl's reward function dispatches on, and the name in ``val-core/<data_source>/...``.
        content: The user message as the model reads it.
        ability: verl's free-form topic column.
        ground_truth: What the reward function compares with.
        split: ``train``, ``validation`` or ``test``.
        index: Position of the row in its source, from 0.
        question: The question as its source has it, without instructions.
        answer: The answer as its source has it.
    """
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": content}],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"split": split, "index": index, "question": question, "answer": answer},
    }


def write(rows: Iterable[Row], path: Path) -> Path:
    """Write `rows` to `path` for verl, read the file back, and return its absolute path.

    The file appears under its name only when it is complete, in place of an older one of the same data source.

    Args:
        rows: At least one row.
        path: The file to write. Its folder is made where it is missing.

    Raises:
        ValueError: There is no row, or a row does not fit `SCHEMA`.
        OSError: The folder cannot be made or written to, or `path` holds another data set.
    """
    path = Path(path).expanduser().absolute()
    rows = list(rows)
    if not rows:
        raise ValueError(f"no rows to write to {path}: verl cannot train or validate on an empty file")
    _refuse_to_replace_another_set(path, {row["data_source"] for row in rows})
    try:
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"a row for {path.name} does not fit verl's columns: {error}") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            pq.write_table(table, part)
            check(part, expected_rows=len(rows))
    except OSError as error:
        raise OSError(f"cannot write to {path.parent}: {error.strerror}. Choose another output folder.") from error
    return path


def _refuse_to_replace_another_set(path: Path, sources: set[str]) -> None:
    if not path.exists():
        return
    try:
        present = set(pq.read_table(path, columns=["data_source"]).column(0).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise FileExistsError(f"{path} exists and is not a file that this package wrote: {error}") from error
    if present != sources:
        raise FileExistsError(
            f"{path} holds {', '.join(sorted(present))}, not {', '.join(sorted(sources))}: "
            "choose another output folder, or remove the file"
        )


def check(path: Path, expected_rows: int | None = None) -> int:
    """Read the parquet file `path` and return its number of rows, if verl can use every one of them.

    Args:
        path: The file.
        expected_rows: How many rows there must be; None accepts any number above 0.

    Raises:
        ValueError: Columns are missing or of another type, the number of rows is wrong, or a row has an empty prompt,
            data source or ground truth.
    """
    table = pq.read_table(path)
    for field in SCHEMA:
        if field.name not in table.column_names:
            raise ValueError(f"{path} has no column {field.name!r}; it has {', '.join(table.column_names)}")
        found = table.schema.field(field.name).type
        if found != field.type:
            raise ValueError(f"{path}: column {field.name!r} is {found}, verl needs {field.type}")
    wanted = table.num_rows if expected_rows is None else expected_rows
    if table.num_rows != wanted or table.num_rows == 0:
        raise ValueError(f"{path} has {table.num_rows} rows instead of {wanted or 'at least one'}")
    for position, row in enumerate(table.to_pylist()):
        _check_row(row, f"{path}, row {position}")
    return table.num_rows


def _check_row(row: dict, where: str) -> None:
    if not row["data_source"]:
        raise ValueError(f"{where}: data_source is empty, so no reward function would be chosen")
    if not row["prompt"] or not all(message["role"] and message["content"] for message in row["prompt"]):
        raise ValueError(f"{where}: the prompt is empty")
    if not row["reward_model"]["ground_truth"]:
        raise ValueError(f"{where}: reward_model.ground_truth is empty, so every answer would be wrong")
