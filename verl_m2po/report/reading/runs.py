"""Find the runs under the given paths, and join the attempts of each run into one series by step."""

# Pandas annotates wider types than it returns.
# pyright: reportArgumentType=false, reportReturnType=false

import itertools
import os
import re
import stat
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from verl_m2po.report.reading.read import Log, is_json_log, is_ledger, read_event_file, read_json_lines
from verl_m2po.report.reading.settings import Settings, read_config, settings

ATTEMPT = re.compile(r"^attempt-(\d+)\.jsonl$")
# Logs that verl_m2po.ground.logs moved aside for a later attempt, which has the name without the number.
EARLIER = re.compile(r"^(.+)\.attempt-(\d+)\.jsonl$")
EVENTS = "events.out.tfevents."
# Ending of an event file that arranges panels and holds no metric.
LAYOUT_SUFFIX = ".layout"
# File names that say nothing about the run: the folder's name is the run's.
GENERIC_STEMS = ("metrics", "log", "logs", "train", "run", "verl", "file")
# Folders that never hold a log but may hold very many files.
SKIPPED_FOLDER = re.compile(r"^(\.|global_step_\d+$)")


@dataclass(frozen=True)
class Source:
    """Where one run's logs are: files in the order of their attempts, and the folder that may hold a config."""

    name: str
    files: tuple[Path, ...]
    folder: Path | None


@dataclass
class Run:
    """One training run.

    Args:
        name: Unique among the runs of a report.
        path: The first log file.
        frame: Metric columns (float, NaN where not logged or not finite) by step (trainer steps).
        settings: What the run was.
        problems: One line for each thing that is missing or wrong.
        not_finite: Metric to the steps at which it was logged as NaN or infinite.
        logged_until_s: When the last of its files was written, in seconds since the epoch; None if that is unknown.
    """

    name: str
    path: Path
    frame: pd.DataFrame
    settings: Settings
    problems: list[str] = field(default_factory=list)
    not_finite: dict[str, list[int]] = field(default_factory=dict)
    logged_until_s: float | None = None

    @property
    def logged(self) -> set[str]:
        """Metrics with at least one finite value."""
        return set(self.frame.columns[self.frame.notna().any()])

    def series(self, metric: str) -> pd.Series:
        """Finite values of one metric by step; empty if it was not logged."""
        return self.frame[metric].dropna() if metric in self.frame else pd.Series(dtype=float)


def _attempt_number(name: str) -> int:
    match = ATTEMPT.match(name)
    assert match
    return int(match[1])


def _age(path: Path) -> tuple[str, float]:
    """The name of the log that `path` is an attempt of, and its place among them: the present one comes last."""
    match = EARLIER.match(path.name)
    return (f"{match[1]}.jsonl", int(match[2])) if match else (path.name, float("inf"))


def _attempts(logs: list[Path]) -> dict[str, tuple[Path, ...]]:
    """The files of each log by its name, oldest attempt first."""
    return {
        name: tuple(paths) for name, paths in itertools.groupby(sorted(logs, key=_age), key=lambda log: _age(log)[0])
    }


def _in_order_of_writing(path: Path) -> list[str | int]:
    """By the numbers in an event file's name: its second, then its writer's; writer 10 comes after writer 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def _unreadable(path: Path) -> str | None:
    """Why a file cannot be read, such as a link to nothing; None where it can."""
    try:
        # Opening a FIFO would wait until somebody writes to it.
        if not stat.S_ISREG(path.stat().st_mode):
            return f"{path}: no regular file, so not read"
        path.open("rb").close()
    except OSError as error:
        return f"{path}: not readable ({error.strerror or type(error).__name__})"
    return None


def _is_log(path: Path) -> bool:
    """False too for a file that is deleted at this moment."""
    try:
        return is_json_log(path)
    except OSError:
        return False


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _file_name(path: Path) -> str:
    if ATTEMPT.match(path.name) or path.stem.lower() in GENERIC_STEMS or path.name.startswith(EVENTS):
        return path.resolve().parent.name
    return path.stem


def _name_among(log: str, folder: Path) -> str:
    """What a log is called that shares its folder with others, so that the folder's name alone is not enough."""
    stem = Path(log).stem
    return f"{folder.resolve().name}/{stem}" if stem.lower() in GENERIC_STEMS else stem


def _in_folder(folder: Path, names: list[str]) -> tuple[list[Source], bool, list[str]]:
    """The runs whose logs lie directly in `folder`, whether it is itself one run, and a line for each odd file."""
    files = [folder / name for name in sorted(names)]
    own_name = folder.resolve().name
    reasons = {path: _unreadable(path) for path in files if path.suffix == ".jsonl" or path.name.startswith(EVENTS)}
    unreadable = [reason for reason in reasons.values() if reason]
    files = [path for path in files if not reasons.get(path)]
    candidates = [path for path in files if path.suffix == ".jsonl"]
    logs = [path for path in candidates if _is_log(path)]
    odd = [path for path in candidates if path not in logs and not ATTEMPT.match(_age(path)[0])]
    odd = [path for path in odd if not is_ledger(path)]
    lines = list(unreadable)
    if odd:
        lines.append(f"{folder}: left out {len(odd)} .jsonl file(s) that are not verl logs, e.g. {odd[0].name}")
    numbered = {name: paths for name, paths in _attempts(candidates).items() if ATTEMPT.match(name)}
    if numbered:
        ordered = [path for name in sorted(numbered, key=_attempt_number) for path in numbered[name]]
        # An empty file may be anything that is about to be written.
        others = [path.name for path in logs if path not in ordered and _size(path)]
        if others:
            unreadable.append(f"{folder}: left out {', '.join(others)}, beside {ordered[0].name} of another run")
        return [Source(own_name, tuple(ordered), folder)], True, unreadable
    if by_name := _attempts(logs):
        if len(by_name) > 1:
            # A config beside several logs belongs to none of them for certain.
            return [Source(_name_among(name, folder), paths, None) for name, paths in by_name.items()], False, lines
        ((name, paths),) = by_name.items()
        return [Source(_file_name(folder / name), paths, folder)], False, lines
    events = [path for path in files if path.name.startswith(EVENTS) and path.suffix != LAYOUT_SUFFIX]
    events = sorted(events, key=_in_order_of_writing)
    if events:
        return [Source(own_name, tuple(events), folder)], True, lines
    return [], False, lines


def find_sources(path: Path) -> tuple[list[Source], list[str]]:
    """The runs at `path`, and a line for each thing that is not one.

    A folder with ``attempt-1.jsonl``, ``attempt-2.jsonl`` ... or with TensorBoard event files is one run. Any other
    ``.jsonl`` log is a run of its own, with the ``<name>.attempt-1.jsonl`` ... that came before it. Folders are
    searched to any depth; event files under a folder with a ``.jsonl`` log are taken for the same run's other logger.
    """
    if path.is_file():
        name, number = _age(path)
        is_present = number == float("inf")
        earlier = [other for other in path.parent.glob("*.attempt-*.jsonl") if is_present and _age(other)[0] == name]
        return [Source(_file_name(path), _attempts([path, *earlier])[name], path.parent)], []
    if not path.is_dir():
        return [], [f"{path}: neither a file nor a folder" if path.exists() else f"{path}: not there"]
    sources: list[Source] = []
    problems: list[str] = []

    def cannot_enter(error: OSError) -> None:
        problems.append(f"{error.filename}: not readable ({error.strerror or type(error).__name__})")

    with_log: set[Path] = set()
    events_under: dict[Path, list[Path]] = defaultdict(list)
    for folder, subfolders, names in os.walk(path, onerror=cannot_enter):
        found, is_one_run, lines = _in_folder(Path(folder), names)
        owner = next((parent for parent in Path(folder).parents if parent in with_log), None)
        if found and EVENTS in found[0].files[0].name:
            if owner:
                events_under[owner].append(Path(folder))
                found = []
        elif found:
            with_log.add(Path(folder))
        sources += found
        problems += lines
        subfolders[:] = [] if is_one_run else sorted(name for name in subfolders if not SKIPPED_FOLDER.match(name))
    if events := [folder for folders in events_under.values() for folder in folders]:
        problems.append(
            f"{path}: left out {len(events)} folder(s) of TensorBoard events under folders with a .jsonl log, e.g. "
            f"{events[0]}; give them as paths to read them"
        )
    if not sources:
        problems.append(f"{path}: no .jsonl log and no TensorBoard events in it")
    return sources, problems


def _restart_step(frame: pd.DataFrame) -> int | None:
    """The first step that an attempt trained; a resumed run first validates at the step it resumes from."""
    trained = frame[[name for name in frame.columns if not name.startswith("val-")]].dropna(how="all")
    return int(trained.index[0]) if len(trained) else None


def join_attempts(logs: list[Log]) -> tuple[pd.DataFrame, list[str]]:
    """Join the attempts of one run, oldest first; a later attempt wins.

    What an earlier attempt logged from the step on at which a later one trained again belongs to weights that were
    thrown away, so it is dropped, and a line says so where that shortens the run.
    """
    joined, problems = pd.DataFrame(), []
    for log in logs:
        if not log.rows:
            continue
        frame = log.frame()
        restart = _restart_step(frame)
        if restart is not None and len(joined):
            abandoned = joined.index[joined.index > max(frame.index)]
            if len(abandoned):
                problems.append(
                    f"{log.path}: trained again from step {restart}; steps {abandoned[0]} to {abandoned[-1]} "
                    "of the attempt before are of discarded weights and were dropped"
                )
            joined = joined[joined.index < restart]
        joined = frame.combine_first(joined)
    return joined.sort_index(), problems


def _take_out_not_finite(logs: list[Log], frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, list[int]]]:
    """NaN and infinities become gaps; returns at which steps they were, per metric."""
    last: dict[tuple[int, str], float] = {}
    for log in logs:
        last.update({(step, name): value for step, row in log.rows.items() for name, value in row.items()})
    not_finite: dict[str, list[int]] = {}
    for (step, name), value in sorted(last.items()):
        if not np.isfinite(value) and step in frame.index and not np.isfinite(frame.at[step, name]):
            not_finite.setdefault(name, []).append(step)
    return frame.replace([np.inf, -np.inf], np.nan), not_finite


def read_run(source: Source) -> Run:
    """Read all attempts of one run. An unreadable file becomes a line in `problems`."""
    logs, problems = [], []
    for path in source.files:
        try:
            logs.append(read_event_file(path) if EVENTS in path.name else read_json_lines(path))
        except OSError as error:
            problems.append(f"{path}: not readable ({error.strerror or type(error).__name__})")
    for log in logs:
        problems += log.problems
    frame, joining = join_attempts(logs)
    frame, not_finite = _take_out_not_finite(logs, frame)
    config, config_problems = read_config(source.folder) if source.folder else ({}, [])
    return Run(
        name=source.name,
        path=source.files[0],
        frame=frame,
        settings=settings(source.name, config),
        problems=problems + joining + config_problems,
        not_finite=not_finite,
        logged_until_s=max((path.stat().st_mtime for path in source.files if path.is_file()), default=None),
    )


def _place(run: Run, with_file: bool) -> tuple[str, ...]:
    """The path whose ends a run may be called by: its folder, and the log's own name where that tells more."""
    stem = Path(_age(run.path)[0]).stem
    folder = run.path.resolve().parent.parts
    return (*folder, stem) if with_file or run.name.split("/")[-1] == stem else folder


def _unique_names(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """Tell runs of the same name apart by the shortest end of their paths that differs."""
    problems = []
    for name, count in Counter(run.name for run in runs).items():
        if count == 1:
            continue
        same = [run for run in runs if run.name == name]
        in_one_folder = len({run.path.resolve().parent for run in same}) < count
        places = {id(run): _place(run, in_one_folder) for run in same}
        ends: dict[int, str] = {}
        for depth in range(1, max(len(parts) for parts in places.values()) + 1):
            ends = {key: "/".join(parts[-depth:]) for key, parts in places.items()}
            # Deep enough to hold the name too.
            if len(set(ends.values())) == count and all(f"/{name}/" in f"/{end}/" for end in ends.values()):
                break
        for run in same:
            end = ends[id(run)]
            run.name = end if len(set(ends.values())) == count else str(run.path)
            run.settings = settings(run.name, run.settings.config)
        problems.append(f"{count} runs are called {name}: shown as {', '.join(run.name for run in same)}")
    return runs, problems


def _log_of(path: Path) -> tuple[Path, str]:
    """What all attempts of a log have in common: their folder, and the name of the log; no number, no time."""
    real = path.resolve()
    name = _age(real)[0]
    if real.name.startswith(EVENTS):
        return real.parent, EVENTS
    return real.parent, "attempt" if ATTEMPT.match(name) else name


def _in_order_of_attempts(path: Path) -> tuple:
    if path.name.startswith(EVENTS):
        return tuple(_in_order_of_writing(path))
    name, place = _age(path)
    return (_attempt_number(name) if ATTEMPT.match(name) else 0, place)


def _joined(parts: list[Source]) -> Source:
    """One source of all files of `parts`, which are of one log: a file may be in several of them."""
    files = {file.resolve(): file for part in parts for file in part.files}
    longest = max(parts, key=lambda part: len(part.files))
    name = longest.name
    if len(files) > len(longest.files):
        name = _file_name(longest.files[0].with_name(_age(longest.files[0])[0]))
    ordered = sorted(files, key=_in_order_of_attempts)
    folder = None if any(part.folder is None for part in parts) else longest.folder
    return Source(name, tuple(files[file] for file in ordered), folder)


def _each_log_once(sources: list[Source]) -> list[Source]:
    """`sources` with those of one log joined, and without a config where several logs lie beside it."""
    by_log: dict[tuple[Path, str], list[Source]] = defaultdict(list)
    for source in sources:
        by_log[_log_of(source.files[0])].append(source)
    joined = [_joined(parts) for parts in by_log.values()]
    beside = Counter(source.folder.resolve() for source in joined if source.folder)
    return [
        replace(source, folder=None) if source.folder and beside[source.folder.resolve()] > 1 else source
        for source in joined
    ]


def read_runs(paths: list[Path]) -> tuple[list[Run], list[str]]:
    """All runs under `paths` that logged at least one step, and a line for each thing that is not there.

    A path given twice, or under another given path, is read once. Attempts of one log that are given file by file, as a
    shell makes them of `*.jsonl`, are one run.
    """
    sources: list[Source] = []
    problems: list[str] = []
    for path in paths:
        found, lines = find_sources(path)
        problems += lines
        sources += found
    runs = [read_run(source) for source in _each_log_once(sources)]
    runs, same_names = _unique_names(runs)
    for run in runs:
        problems += run.problems
    return [run for run in runs if len(run.frame)], problems + same_names
