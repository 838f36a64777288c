import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import yaml
from report_logs import stale_run, write_config, write_log
from rich.console import Console

from verl_m2po.report.build import build
from verl_m2po.report.drawing.tables import markdown, rows, terminal
from verl_m2po.report.drawing.write import PLOTS, draw, write

ACC = "val-core/addition/acc/mean@1"
EVIL = "<script>alert(1)</script>|[red]`x`"


class Page(HTMLParser):
    """Everything on a page that could load or run something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "data", "action", "srcset")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data):
        self.text += data


def one_run(folder):
    write_log(folder / "m2po-s256/attempt-1.jsonl", stale_run("m2po", 64, seed=1, steps=30))
    return build([folder], target=0.4)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of one run, drawn once."""
    root = tmp_path_factory.mktemp("written")
    return write(one_run(root / "runs"), root / "out")


def test_the_page_is_self_contained(written):
    text = written.page.read_text()
    page = Page(text)
    assert page.addresses and all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "embed", "a"})
    assert "url(" not in text and "@import" not in text and "http://" not in text and "https://" not in text
    assert "default-src 'none'" in text
    assert "m2po, s=256" in page.text


def test_every_figure_is_there_as_png_and_svg(written):
    assert {path.suffix for path in written.figures} == {".png", ".svg"}
    assert len(written.figures) == 2 * len(Page(written.page.read_text()).addresses)
    for path in written.figures:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
    assert not list(written.page.parent.glob(".*"))


def test_the_same_logs_give_the_same_bytes(written, tmp_path):
    again = write(one_run(tmp_path / "runs"), tmp_path / "out")
    assert again.page.read_bytes() == written.page.read_bytes()


def test_names_are_escaped_everywhere(tmp_path):
    """A loss name comes from a config file that somebody else may have written."""
    write_log(tmp_path / "runs/x/attempt-1.jsonl", {1: {ACC: 0.5}})
    write_config(tmp_path / "runs/x", loss=EVIL, staleness_updates=4)
    report = build([tmp_path / "runs"])
    written = write(report, tmp_path / "out")
    text = written.page.read_text()
    assert "<script" not in text and EVIL in Page(text).text
    table = written.table.read_text()
    assert "<script" not in table
    (row,) = [line for line in table.splitlines() if "alert" in line and line.startswith("|")]
    header = next(line for line in table.splitlines() if line.startswith("| run"))
    assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", header))
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(terminal(report.summaries))
    assert "[red]" in console.export_text()


def test_the_table_in_the_terminal_fits_80_columns_and_folds_no_number(tmp_path):
    for seed in (1, 2, 3):
        folder = tmp_path / f"no_trust_region-s256-seed{seed}"
        write_log(folder / "attempt-1.jsonl", stale_run("no_trust_region", 64, seed))
    report = build([tmp_path], target=0.55)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal(report.summaries, report.target))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    (row,) = rows(report.summaries, report.target)
    assert "±" in row["final"] and "/3)" in row["steps to 0.55"]
    for title, cell in row.items():
        assert cell in text, title
        assert all(word in text for word in title.split()), title


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100%"), (0.996, "100%"), (0.0, "0%"), (0.1234, "12%"), (0.0006, "0.06%"), (1e-7, "0.00001%")],
)
def test_a_share_is_never_written_with_an_exponent(tmp_path, share, text):
    report = build([write_log(tmp_path / "x.jsonl", {1: {ACC: 0.5, "actor/pg_clipfrac": share}})])
    assert rows(report.summaries, None)[0]["clipped or masked"] == text


@pytest.mark.parametrize(
    ("figures", "pages"), [("--figures", {"report.md", "report.html"}), ("--no-figures", {"report.md"})]
)
def test_a_folder_whose_name_is_no_text_is_reported(tmp_path, figures, pages):
    folder = tmp_path / os.fsdecode(b"caf\xe9-run")
    write_log(folder / "metrics.jsonl", {step: {ACC: 0.5} for step in (1, 2)})
    command = [sys.executable, "-m", "verl_m2po", "report", folder, "--out", tmp_path / "out", figures]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"caf?-run" in done.stdout
    # What cannot be printed is a space in the table of report.md.
    assert {page for page in pages if re.search("caf[? ]-run", (tmp_path / "out" / page).read_text())} == pages


def test_markdown_of_nothing_says_so():
    assert "Nothing to show" in markdown([], None, ["runs/x: not there"])
    assert "runs/x: not there" in markdown([], None, ["runs/x: not there"])


@pytest.mark.parametrize("where", ["draw", "render"])
def test_a_figure_that_fails_is_a_line_and_the_page_is_written(tmp_path, monkeypatch, where):
    plots = [plot for plot in PLOTS if plot.name in ("accuracy", "throughput")]

    def fail(*_, **__):
        raise MemoryError("too much\nof it")

    def draw_unrenderable(*arguments):
        figure = throughput(*arguments)
        figure.savefig = fail
        return figure

    throughput = plots[1].draw
    plots[1] = replace(plots[1], draw=fail if where == "draw" else draw_unrenderable)
    monkeypatch.setattr("verl_m2po.report.drawing.write.PLOTS", plots)
    write_log(tmp_path / "x/attempt-1.jsonl", {1: {ACC: 0.5, "perf/throughput": 9.0}})
    written = write(build([tmp_path / "x"]), tmp_path / "out")
    assert [path.name for path in written.figures] == ["accuracy.png", "accuracy.svg"]
    assert "no figure throughput: drawing it failed (MemoryError: too much of it)" in written.page.read_text()


def test_a_figure_that_can_no_longer_be_drawn_is_not_left_behind(tmp_path):
    out = tmp_path / "out"
    write_log(tmp_path / "a/x/attempt-1.jsonl", {1: {ACC: 0.5, "perf/throughput": 9.0}})
    write(build([tmp_path / "a"]), out)
    assert (out / "throughput.png").exists()
    write_log(tmp_path / "b/x/attempt-1.jsonl", {1: {ACC: 0.5}})
    written = write(build([tmp_path / "b"]), out)
    assert not (out / "throughput.png").exists()
    assert any(line.startswith("no figure throughput: no perf/throughput") for line in written.problems)


@pytest.mark.parametrize("removed", ["actor/", "timing_s/", "perf/", "val-core/", "training/"])
def test_a_metric_that_was_not_logged_is_a_line_not_an_exception(tmp_path, removed):
    rows = stale_run("m2po", 64, seed=1, steps=20)
    kept = {step: {n: v for n, v in row.items() if not n.startswith(removed)} for step, row in rows.items()}
    full, less = tmp_path / "full/m2po-s256.jsonl", tmp_path / "less/m2po-s256.jsonl"
    lines = [
        [*report.problems, *draw(report)[1]]
        for report in (build([write_log(full, rows)]), build([write_log(less, kept)]))
    ]
    assert any(removed in line or "accuracy" in line for line in set(lines[1]) - set(lines[0]))


def test_panels_of_a_strip_that_were_not_logged_are_one_line(tmp_path):
    write_log(tmp_path / "a.jsonl", {1: {"actor/grad_norm": 0.5, "actor/ppo_kl": 0.1}})
    write_log(tmp_path / "b.jsonl", {1: {"actor/grad_norm": 0.5}})
    _, problems = draw(build([tmp_path]))
    (line,) = [line for line in problems if line.startswith("figure health")]
    assert "actor/entropy or actor/m2po/entropy_kept, " in line and "grad_norm" not in line
    assert line.endswith("; actor/m2po/kl or actor/ppo_kl (of b)")


def test_groups_beyond_the_heat_maps_are_named(tmp_path):
    for run in "abcdefghijklmn":
        write_log(tmp_path / f"{run}.jsonl", {1: {"staleness/age_updates_min": 4, "staleness/age_updates_max": 4}})
    _, problems = draw(build([tmp_path]))
    assert "figure age_of_data shows the first 12 groups only, not m; n" in problems


def test_a_metric_that_is_nan_throughout_is_named(tmp_path):
    rows = {step: {ACC: 0.5, "actor/grad_norm": float("nan")} for step in range(5)}
    write_log(tmp_path / "runs/x/attempt-1.jsonl", rows)
    written = write(build([tmp_path / "runs"]), tmp_path / "out")
    assert any("actor/grad_norm is NaN or infinite at 5 step(s): 0, 1, 2, ..." in line for line in written.problems)


def test_runs_of_different_lengths_that_died_and_are_not_there_in_one_report(tmp_path):
    runs = tmp_path / "runs"
    write_log(runs / "m2po-s256-seed1/attempt-1.jsonl", stale_run("m2po", 64, 1, steps=40))
    write_log(runs / "m2po-s256-seed2/attempt-1.jsonl", stale_run("m2po", 64, 2, steps=20), cut='{"step": 21, "da')
    write_log(runs / "grpo-s256/attempt-1.jsonl", {})
    write_log(runs / "other/attempt-1.jsonl", stale_run("grpo", 0, 1, steps=20, task="gsm8k"))
    written = write(build([runs, tmp_path / "nowhere"]), tmp_path / "out")
    text = "\n".join(written.problems)
    for expected in ("is cut", "empty", "nowhere: not there", "its seeds end at steps 20, 40", "2 tasks"):
        assert expected in text
    assert (tmp_path / "out/accuracy.png").exists()


def test_an_empty_report_can_be_written(tmp_path):
    written = write(build([tmp_path / "nowhere"]), tmp_path / "out")
    assert written.figures == [] and "not there" in written.page.read_text()


def test_the_report_imports_neither_torch_nor_verl_nor_another_room(tmp_path):
    code = (
        "import sys\n"
        "from verl_m2po.report import build, command\nfrom verl_m2po.report.drawing import dashboard\n"
        "assert 'matplotlib' not in sys.modules, 'matplotlib'\n"
        "from verl_m2po.report.drawing import write\n"
        "bad = {'torch', 'verl', 'ray', 'vllm'} & set(sys.modules)\n"
        "ours = {m for m in sys.modules if m.startswith('verl_m2po.')}\n"
        "bad |= {m for m in ours if m.split('.')[1] not in ('report', 'ground')}\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_page_names_model_data_learning_rate_and_date(tmp_path):
    folder = tmp_path / "m2po-s256"
    write_log(folder / "attempt-1.jsonl", stale_run("m2po", 64, seed=1, steps=4))
    model, data = {"path": "Qwen/Qwen2.5-Math-7B"}, {"train_files": ["/a/b/gsm8k/train.parquet"]}
    config = {"actor_rollout_ref": {"actor": {"optim": {"lr": 3e-5}}, "model": model}, "data": data}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    os.utime(folder / "attempt-1.jsonl", (0, 1_700_000_000))
    page = write(build([tmp_path]), tmp_path / "out").page.read_text()
    for text in ("Qwen/Qwen2.5-Math-7B", "gsm8k/train.parquet", "3e-05", "2023-11-14 22:13"):
        assert f"<td>{text}</td>" in page
