"""Every row of a source is either in the parquet file, and scored 1 for its own answer, or listed with the reason."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from verl_m2po.tasks import parquet, prepare, scoring
from verl_m2po.tasks.sets import DATA_SETS

pytestmark = pytest.mark.slow

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
# Our name, the folder, rows in it, and the rows whose answer the source left empty.
REAL = [
    ("gsm8k", "gsm8k/train.jsonl", 7473, set()),
    ("gsm8k", "gsm8k/test.jsonl", 1319, set()),
    ("aime24", "aime24/test.jsonl", 30, set()),
    ("amc23", "amc23/test.jsonl", 40, set()),
    ("gaokao", "gaokao2023en/test.jsonl", 385, {167, 192}),
    ("minerva", "minerva_math/test.jsonl", 272, set()),
    ("olympiad", "olympiadbench/test.jsonl", 675, set()),
]
# math-verify takes some 10 ms for an answer: of the sets that it scores, one row in this many is tried.
EVERY = 8


def write_source(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "file", "count", "empty"), REAL, ids=lambda value: str(value).replace("/", "-"))
def test_real_rows(tmp_path: Path, name: str, file: str, count: int, empty: set[int]) -> None:
    if not (SHARED / file).is_file():
        pytest.skip(f"{SHARED / file} is not here")
    data_set = DATA_SETS[name]
    lines = (SHARED / file).read_text(encoding="utf-8").splitlines()
    assert len(lines) == count
    if data_set.data_source.startswith(scoring.MATH_VERIFY) and count > 100:
        tried = sorted({*range(0, count, EVERY), *empty})
    else:
        tried = list(range(count))
    source = write_source(tmp_path / Path(file).name, [json.loads(lines[index]) for index in tried])

    [done] = prepare.prepare(name, tmp_path / "out", source=source)

    assert {tried[row.index] for row in done.unusable} == empty
    assert {row.reason for row in done.unusable} <= {"the answer is empty"}
    assert done.path is not None
    assert parquet.check(done.path) == done.rows == len(tried) - len(empty)
    for row in pq.read_table(done.path).to_pylist():
        truth = row["reward_model"]["ground_truth"]
        assert row["prompt"][0]["content"] == f"{row['extra_info']['question']} {data_set.instruction}"
        if not data_set.data_source.startswith(scoring.MATH_VERIFY):
            assert scoring.is_right(row["data_source"], f"Thus {data_set.answered.format(truth)}", truth)


def deepscaler_rows() -> list[dict]:
    return [
        {"problem": "What is $1+1$?", "answer": "2", "solution": ""},
        {"problem": "", "answer": "2", "solution": ""},
        {"problem": "What is half of one?", "answer": "$\\frac{1}{2}$", "solution": ""},
        {"problem": "What is missing?", "answer": None, "solution": ""},
        {"problem": "What is empty?", "answer": " ", "solution": ""},
    ]


def test_no_row_is_lost_without_a_reason(tmp_path: Path) -> None:
    source = write_source(tmp_path / "any_name.jsonl", deepscaler_rows())
    [done] = prepare.prepare("deepscaler", tmp_path / "out", source=source)
    assert done.rows + len(done.unusable) == 5
    reasons = {row.index: row.reason for row in done.unusable}
    assert reasons == {1: "the question is empty", 3: "the answer is empty", 4: "the answer is empty"}
    assert done.path == (tmp_path / "out" / "train.parquet").absolute()
    assert [row["extra_info"]["index"] for row in pq.read_table(done.path).to_pylist()] == [0, 2]
    assert done.unusable_path is not None
    listed = [json.loads(line) for line in done.unusable_path.read_text().splitlines()]
    assert [(row["index"], row["question"]) for row in listed] == [
        (1, ""),
        (3, "What is missing?"),
        (4, "What is empty?"),
    ]


def test_an_answer_that_verl_does_not_recognise_is_listed(tmp_path: Path) -> None:
    # verl looks for a boxed answer in the last 100 characters only.
    rows = [{"problem": "p", "answer": "7"}, {"problem": "p", "answer": "1" * 400}]
    [done] = prepare.prepare("aime24", tmp_path / "out", source=write_source(tmp_path / "test.jsonl", rows))
    assert done.rows == 1
    assert done.unusable[0].reason.startswith("verl's scorer does not recognise the answer: '1111")


def test_a_list_of_unusable_rows_goes_when_they_are_mended(tmp_path: Path) -> None:
    bad, good = {"problem": "p", "answer": "x"}, {"problem": "p", "answer": "7"}
    for rows, listed in (([bad, good], True), ([good], False)):
        [done] = prepare.prepare("aime25", tmp_path / "out", source=write_source(tmp_path / "test.jsonl", rows))
        assert (done.unusable_path is not None) == listed
        assert (tmp_path / "out" / "test.unusable.jsonl").exists() == listed


def test_a_split_without_a_usable_row_has_no_file(tmp_path: Path) -> None:
    source = write_source(tmp_path / "test.jsonl", [{"problem": "p", "answer": "x"}])
    [done] = prepare.prepare("aime24", tmp_path / "out", source=source)
    assert (done.path, done.rows, len(done.unusable)) == (None, 0, 1)


def test_leading_zeros_are_text_until_they_are_read(tmp_path: Path) -> None:
    source = write_source(tmp_path / "test.jsonl", [{"problem": "p", "answer": "025"}])
    [done] = prepare.prepare("aime24", tmp_path / "out", source=source)
    assert done.path is not None
    assert pq.read_table(done.path).to_pylist()[0]["reward_model"]["ground_truth"] == "25"


@pytest.mark.parametrize("columns", [{"answer": "2"}, {"solution": "Thus $\\boxed{2}$."}])
def test_the_answer_may_be_in_either_column(tmp_path: Path, columns: dict) -> None:
    source = write_source(tmp_path / "test.jsonl", [{"problem": "p", **columns}])
    [done] = prepare.prepare("minerva", tmp_path / "out", source=source)
    assert done.path is not None
    assert pq.read_table(done.path).to_pylist()[0]["reward_model"]["ground_truth"] == "2"


def test_a_folder_gives_every_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_source(tmp_path / f"{split}.jsonl", [{"question": split, "answer": "#### 1"}])
    done = prepare.prepare("gsm8k", tmp_path / "out", source=tmp_path)
    assert [(one.split, one.rows) for one in done] == [("train", 1), ("test", 1)]


def test_progress_counts_every_row(tmp_path: Path) -> None:
    source = write_source(tmp_path / "test.jsonl", [{"question": "q", "answer": "#### 1"}] * 5)
    seen: list[tuple[str, int, int]] = []
    prepare.prepare("gsm8k", tmp_path / "out", source=source, on_row=lambda *row: seen.append(row))
    assert seen == [("test", done, 5) for done in range(1, 6)]


def test_two_sets_do_not_overwrite_each_other(tmp_path: Path) -> None:
    source = write_source(tmp_path / "test.jsonl", [{"problem": "p", "answer": "7"}])
    prepare.prepare("aime24", tmp_path / "out", source=source)
    with pytest.raises(FileExistsError, match="holds aime24, not aime25"):
        prepare.prepare("aime25", tmp_path / "out", source=source)


@pytest.mark.parametrize(
    ("name", "hint"), [("gsm8", "Did you mean 'gsm8k'"), ("math50", "Did you mean 'math500'"), ("zzz", "Known: gsm8k")]
)
def test_an_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"unknown data set '{name}'.*{hint}"):
        prepare.find(name)


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--source .*nowhere.jsonl does not exist"):
        prepare.prepare("aime24", tmp_path / "out", source=tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("test.txt", "x", r"does not end in .jsonl, .json, .parquet, .csv"),
        ("test.jsonl", "not json\n", "cannot be read"),
        ("test.parquet", "not parquet", "cannot be read"),
        ("test.jsonl", '{"problem": "p"}\n', r"column with the answer named 'answer'; the source has problem"),
        ("test.jsonl", '{"answer": "1"}\n', r"column with the question named 'problem'; the source has answer"),
    ],
)
def test_a_source_that_cannot_be_used(tmp_path: Path, file: str, text: str, message: str) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        prepare.prepare("aime24", tmp_path / "out", source=tmp_path / file)


def test_a_file_whose_split_is_a_guess(tmp_path: Path) -> None:
    source = write_source(tmp_path / "rows.jsonl", [{"question": "q", "answer": "#### 1"}])
    with pytest.raises(ValueError, match=r"name it after one \(train, test\), or pass the folder"):
        prepare.prepare("gsm8k", tmp_path / "out", source=source)


def test_a_folder_without_a_split(tmp_path: Path) -> None:
    write_source(tmp_path / "train.jsonl", [{"question": "q", "answer": "#### 1"}])
    with pytest.raises(ValueError, match=r"has no test file; GSM8K needs exactly one of test.jsonl, test.json"):
        prepare.prepare("gsm8k", tmp_path / "out", source=tmp_path)


def test_a_folder_with_two_files_of_a_split(tmp_path: Path) -> None:
    for name in ("test.jsonl", "test.json"):
        write_source(tmp_path / name, [{"problem": "p", "answer": "7"}])
    with pytest.raises(ValueError, match=r"has test.jsonl and test.json; AIME 2024 needs exactly one of"):
        prepare.prepare("aime24", tmp_path / "out", source=tmp_path)
