"""Runs the jobs of the study side by side, skips those that are finished, and says how long the rest will take."""

import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import yaml
from pages import processor
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

import verl_m2po.config
from staleness_study import tried
from staleness_study.plan import Job, longest

# What is, or was, run in a folder.
RECORD = "run.json"
CONFIG_FILES = Path(verl_m2po.config.__file__).parent
LOG = "attempt-1.jsonl"
# Longer than a line of the log.
TAIL_BYTES = 16_384


def is_whole(job: Job, out: Path) -> bool:
    """Whether the run is there, with the overrides of `job` and at least as many trainer steps."""
    record, log = job.folder(out) / RECORD, job.folder(out) / LOG
    if not record.is_file() or not log.is_file():
        return False
    return json.loads(record.read_text())["overrides"] == job.all_overrides and last_step(log) >= job.steps


def is_done(job: Job, out: Path) -> bool:
    """Whether the run is there whole, and as it would be made now."""
    if not is_whole(job, out):
        return False
    record = json.loads((job.folder(out) / RECORD).read_text())
    # The hash of the config files is younger than the first runs, of which it is not known.
    return all(record.get(key, value) == value for key, value in provenance(job).items())


def provenance(job: Job) -> dict[str, Any]:
    """What the numbers of a run depend on beside its overrides, as its record has it."""
    from verl_m2po.one_process import setup as setups
    from verl_m2po.one_process import train

    return {
        "config": job.config,
        "config_files": config_hash(CONFIG_FILES, tuple(job.all_overrides)),
        "model": asdict(setups.RECIPES[job.config]),
        "versions": train.versions(),
    }


@functools.cache
def config_hash(folder: Path, overrides: tuple[str, ...]) -> str:
    """SHA-256 of what the config files below `folder` set: of what is in them without comments.

    Of a group from which `overrides` choose an option the other options do not count, so that a new one lets no run
    begin anew. Composing all jobs for it would take minutes.
    """
    chosen = dict(override.split("=", 1) for override in overrides)
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*.yaml")):
        group = path.parent.relative_to(folder).as_posix()
        if chosen.get(group, path.stem) != path.stem:
            continue
        content = yaml.safe_load(path.read_text())
        whole.update(f"{path.relative_to(folder)}\n{json.dumps(content)}\n".encode())
    return whole.hexdigest()


def last_step(log: Path) -> int:
    """The trainer step of the last whole line of one of verl's JSON-lines logs; -1 for none."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - TAIL_BYTES))
        lines = stream.read().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n") and line.startswith(b'{"step"')]
    return json.loads(whole[-1])["step"] if whole else -1


def _start_worker(steps: Any) -> None:
    """Once in each worker process: one thread of torch, the study's losses, and where to report each trainer step."""
    import torch

    torch.set_num_threads(1)
    os.environ["VERL_PLATFORM"] = "cpu"
    tried.register_all()
    _run.steps = steps


@contextmanager
def _claim(folder: Path) -> Iterator[bool]:
    """Whether the run in `folder` is ours, not that of another call of the study; given up when the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".claim").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _run(job: Job, out: Path) -> str:
    """Run `job` unless another call of the study runs it or ran it; returns what became of it."""
    with _claim(job.folder(out)) as ours:
        if not ours or is_done(job, out):
            _run.steps.put(job.steps)
            return f"left {job.name} to another process"
        _train(job, out)
        return f"finished {job.name}"


def _train(job: Job, out: Path) -> None:
    from verl_m2po.one_process import setup as setups
    from verl_m2po.one_process import train

    setup = setups.read([*job.all_overrides, f"trainer.total_training_steps={job.steps}"], job.config)
    record = {
        "job": asdict(job),
        "overrides": job.all_overrides,
        **provenance(job),
        "machine": processor(),
    }
    folder = job.folder(out)
    # Otherwise the log of an earlier run would be taken for this one's.
    (folder / LOG).unlink(missing_ok=True)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    train.train(setup, setups.base_model(setup.recipe), setup.recipe.digits, folder, lambda *_: _run.steps.put(1))


class _Rate:
    """Trainer steps a second since the start, and with it the time that the rest will take."""

    def __init__(self) -> None:
        self.began, self.steps = time.time(), 0

    def left(self, total: int) -> str:
        if not self.steps:
            return "-:--:--"
        return str(timedelta(seconds=int((total - self.steps) * (time.time() - self.began) / self.steps)))


def run_jobs(jobs: Sequence[Job], out: Path, workers: int, console: Console) -> list[str]:
    """Run the jobs that are not finished; return a line for each that failed.

    Args:
        jobs: In the order in which they are started.
        out: Folder of the runs.
        workers: Runs at a time.
        console: Where progress is shown.

    Raises:
        BrokenProcessPool: A worker process was killed. What was finished stays, and the next call goes on from there.
    """
    jobs = longest(jobs)
    missing = [job for job in jobs if not is_done(job, out)]
    console.print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them finished, {workers} at a time, in {out}")
    if not missing:
        return []
    from verl_m2po.one_process import setup as setups

    # Once, not in every worker
    for config in {job.config for job in missing}:
        setups.base_model(setups.RECIPES[config])
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    total, rate, failed = sum(job.steps for job in missing), _Rate(), []
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=total)

        def count() -> None:
            while (steps := queue.get()) is not None:
                rate.steps += steps
                progress.update(bar, completed=rate.steps, description=f"left {rate.left(total)}")

        counter = Thread(target=count, daemon=True)
        counter.start()
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(queue,))
        futures: dict[Future[str], Job] = {pool.submit(_run, job, out): job for job in missing}
        try:
            for future in as_completed(futures):
                try:
                    console.print(f"{future.result()}, {rate.left(total)} left")
                except BrokenProcessPool:
                    raise
                except Exception as error:
                    failed.append(f"{futures[future].name}: {type(error).__name__}: {error}")
                    console.print(failed[-1], markup=False, style="red")
        finally:
            pool.shutdown(cancel_futures=True, wait=True)
            queue.put(None)
            counter.join()
    return failed
