"""Runs verl's main, on the CPU by default, in a subprocess with a time limit, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# Inherited by every process that the run starts, Ray's daemons included.
MARK = "M2PO_TEST_RUN"
# A cluster of its own, whatever else runs on the machine.
LOCAL_RAY = "++ray_kwargs.ray_init.address=local"


@dataclass
class Result:
    """What a run left."""

    status: int
    output: str
    steps: list[dict] = field(default_factory=list)

    def series(self, metric: str) -> list[float]:
        """The values of `metric`, one for each step that logged it."""
        return [step["data"][metric] for step in self.steps if metric in step["data"]]

    @property
    def tail(self) -> str:
        """The end of what it printed, for assertion messages."""
        return "\n".join(self.output.splitlines()[-60:])


def run_main(
    folder: Path,
    *overrides: str,
    config_name: str = "arithmetic",
    hardware: str = "cpu",
    timeout_s: float = 700,
    environment: dict | None = None,
) -> Result:
    """Run ``python -m verl.trainer.main_ppo`` with `overrides`; fail after `timeout_s`, and kill whatever is left."""
    main = [sys.executable, "-m", "verl.trainer.main_ppo", f"--config-name={config_name}", f"hardware={hardware}"]
    metrics = folder / "metrics.jsonl"
    logger = {"VERL_FILE_LOGGER_PATH": str(metrics)}
    result = run_command(
        folder, [*main, LOCAL_RAY, *overrides], timeout_s, {**os.environ, **logger, **(environment or {})}
    )
    result.steps = read_steps(metrics)
    return result


def read_steps(metrics: Path) -> list[dict]:
    """What verl's `file` logger wrote."""
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def run_command(folder: Path, command: list[str], timeout_s: float, environment: dict[str, str]) -> Result:
    """Run `command` in `folder` with the variables `environment`; fail after `timeout_s`, and kill whatever is left."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    log = folder / "output.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={"TENSORBOARD_DIR": str(folder / "tensorboard"), **environment, MARK: mark},
        )
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            status = process.wait()
            stream.write(f"\nkilled after {timeout_s} s\n")
        finally:
            kill_marked(mark)
    return Result(status, log.read_text(errors="replace"))


def marked(mark: str) -> list[psutil.Process]:
    """The living processes of the run `mark`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def kill_marked(mark: str, grace_s: float = 10) -> None:
    """Give the run's processes `grace_s` to end, then kill them."""
    deadline = time.monotonic() + grace_s
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=10)
