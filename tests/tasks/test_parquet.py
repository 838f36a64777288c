"""What is written for verl is what verl reads, and nothing else is left behind."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl_m2po.tasks import arithmetic, parquet


def rows(count: int = 3) -> list[parquet.Row]:
    return list(arithmetic.rows(count, split="train"))


def test_verl_reads_every_prompt(tmp_path: Path) -> None:
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset

    from verl_m2po.tasks.tiny_model import make_tokenizer

    path = parquet.write(rows(), tmp_path / "train.parquet")
    config = OmegaConf.create({"max_prompt_length": 16, "filter_overlong_prompts_workers": None})
    data = RLHFDataset(str(path), make_tokenizer(), config)  # pyright: ignore[reportArgumentType]
    assert len(data) == 3
    for item, row in zip((data[index] for index in range(3)), rows(), strict=True):
        assert item["raw_prompt"] == row["prompt"]
        assert item["reward_model"] == row["reward_model"]
        assert item["index"] == row["extra_info"]["index"]


def test_files_of_different_sets_can_be_trained_on_together(tmp_path: Path) -> None:
    import datasets

    other = parquet.make_row(
        data_source="other",
        content="?",
        ability="math",
        ground_truth="1",
        split="train",
        index=0,
        question="?",
        answer="1",
    )
    paths = [parquet.write(rows(), tmp_path / "a.parquet"), parquet.write([other], tmp_path / "b.parquet")]
    parts = [
        datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path / "cache"))["train"]
        for path in paths
    ]
    assert len(datasets.concatenate_datasets(parts)) == 4


def test_a_file_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    broken = rows()
    broken[1]["reward_model"]["ground_truth"] = ""
    with pytest.raises(ValueError, match=r"row 1: reward_model.ground_truth is empty"):
        parquet.write(broken, tmp_path / "train.parquet")
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_of_the_same_set_is_replaced(tmp_path: Path) -> None:
    parquet.write(rows(5), tmp_path / "train.parquet")
    path = parquet.write(rows(2), tmp_path / "train.parquet")
    assert parquet.check(path, expected_rows=2) == 2


def test_a_file_of_another_set_is_not_replaced(tmp_path: Path) -> None:
    path = parquet.write(rows(), tmp_path / "train.parquet")
    before = path.read_bytes()
    other = [{**row, "data_source": "other"} for row in rows()]
    with pytest.raises(FileExistsError, match=r"holds arithmetic, not other: choose another output folder"):
        parquet.write(other, path)  # pyright: ignore[reportArgumentType]
    assert path.read_bytes() == before


def test_a_file_that_is_not_parquet_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_text("notes")
    with pytest.raises(FileExistsError, match="not a file that this package wrote"):
        parquet.write(rows(), path)
    assert path.read_text() == "notes"


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows to write"):
        parquet.write([], tmp_path / "train.parquet")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to .*file.* Choose another output folder"):
        parquet.write(rows(), tmp_path / "file" / "train.parquet")


def table(**changes: pa.Array | None) -> pa.Table:
    whole = pa.Table.from_pylist(rows(), schema=parquet.SCHEMA)
    for name, column in changes.items():
        position = whole.column_names.index(name)
        whole = whole.remove_column(position)
        if column is not None:
            whole = whole.add_column(position, name, column)
    return whole


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (table(prompt=None), "has no column 'prompt'; it has data_source, ability"),
        (table(prompt=pa.array(["1+1"] * 3)), "column 'prompt' is string, verl needs list"),
        (table(data_source=pa.array(["a", "", "a"])), "row 1: data_source is empty"),
        (table().slice(0, 0), "0 rows instead of at least one"),
        (
            table(prompt=pa.array([[{"role": "user", "content": ""}]] * 3, parquet.SCHEMA.field("prompt").type)),
            "row 0: the prompt is empty",
        ),
    ],
)
def test_what_verl_cannot_use_is_named(tmp_path: Path, broken: pa.Table, message: str) -> None:
    pq.write_table(broken, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        parquet.check(tmp_path / "x.parquet")


def test_a_lost_row_is_noticed(tmp_path: Path) -> None:
    path = parquet.write(rows(3), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="3 rows instead of 4"):
        parquet.check(path, expected_rows=4)
