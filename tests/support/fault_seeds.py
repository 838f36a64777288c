"""Kills the processes of real training runs, one after the other, restarts them, and checks what was trained on.

    make faults SEEDS=1-12 KILLS=0

Each seed is one fault: which process, and in the midst of what. The seeds are spread over several kinds of run; the
faults of one kind hit one training run, attempt after attempt with the same command, and a last attempt ends
undisturbed. Where the run heals it must go on instead, and the next fault hits the same attempt. Then the ledger of all
attempts must be that of a run that nothing has happened to, and what a journal holds must not have been generated
again. Two of the faults ask the run to end.
"""

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cpu_run
from fault_runs import (
    HEAL_WITHIN_S,
    SAVE_EVERY,
    SEPARATE,
    STALENESS_STEPS,
    START_WITHIN_S,
    STEP_WITHIN_S,
    TARGETS,
    Attempt,
    Kind,
    TrainingRun,
    title_of,
)
from trained_rows import broken, redone_steps

from verl_m2po.launch.signals import _segments
from verl_m2po.staleness.restart.frames import decode, read_frames

END_WITHIN_S = 120.0
"""A run that lost a process must have ended by itself after that."""

ASKED_END_WITHIN_S = 30.0

# Twelve seeds go to the kinds of one row, the next twelve to those of the next.
KINDS = (
    {
        "stale_k": Kind("stale_k"),
        "stale_k_separate": Kind("stale_k_separate", overrides=SEPARATE),
        "bounded_async": Kind("bounded_async", overrides=SEPARATE),
    },
    {
        "on_policy": Kind("stale_k", staleness_steps=0),
        "stale_k_separate_journal": Kind("stale_k_separate", has_journal=True, overrides=SEPARATE),
        "bounded_async_journal": Kind("bounded_async", has_journal=True, overrides=SEPARATE),
    },
    {
        "stale_k_masked": Kind("stale_k", has_journal=True, masks=True),
        "stale_k_separate_masked": Kind("stale_k_separate", masks=True, overrides=SEPARATE),
        "bounded_async_masked": Kind("bounded_async", has_journal=True, masks=True, overrides=SEPARATE),
    },
)


DRAWN = tuple(TARGETS)[:12]
"""Seeds go round in this order."""

MOMENTS = ("start", "generation", "training", "saving")
"""In the midst of what; the last three as in `fault_runs.METHODS`."""


@dataclass
class Fault:
    """One killed process and what came of it. Times in seconds."""

    seed: int
    kind: str
    target: str
    moment: str
    after_steps: int
    delay_s: float
    killed_after_step: int = 0
    ended_after_s: float | None = None
    status: int | None = None
    error: str = ""
    redone_steps: int = 0
    has_healed: bool = False
    recovered_after_s: float | None = None
    left: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def draw(cls, seed: int) -> "Fault":
        """The fault of `seed`. Targets, kinds and moments go round at different periods, the rest is chance."""
        rng = random.Random(seed)
        kinds = list(KINDS[(seed - 1) // len(DRAWN) % len(KINDS)])
        return cls(
            seed=seed,
            kind=kinds[seed // 4 % len(kinds)],
            target=DRAWN[seed % len(DRAWN)],
            moment=MOMENTS[(seed + seed // 4) % len(MOMENTS)],
            after_steps=rng.choice([1, 2, 3]),
            delay_s=round(rng.uniform(0.0, 0.5), 3),
        )


class Campaign:
    """One training run and the faults that hit it.

    Args:
        folder: of everything that it writes.
        faults: in their order.
        say: told of each.
    """

    def __init__(self, folder: Path, faults: list[Fault], say: Callable[[str], None] = print) -> None:
        self.folder, self.faults, self._say = folder, faults, say
        self.kind = next(row[faults[0].kind] for row in KINDS if faults[0].kind in row)
        # Long enough for every fault to hit before the end, and for the steps that show that one has healed.
        enough = sum(
            fault.after_steps + SAVE_EVERY + STALENESS_STEPS + 2 for fault in faults if fault.moment != "start"
        )
        self.training = TrainingRun(folder, self.kind, enough + 4)
        self._attempts: list[list[dict]] = []
        self._running: Attempt | None = None
        self._ended: list[Fault] = []
        self._journaled: dict[str, set[str]] = {}
        self._generated_again: list[str] = []

    def run(self) -> None:
        """Kill, restart, ...; fills in `faults`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for fault in self.faults:
            attempt = self._attempt()
            try:
                self._say(f"seed {fault.seed}: {fault.kind}, {fault.target} during {fault.moment}")
                self._hit(attempt, fault)
            except BaseException:
                attempt.close()
                raise
            if not fault.has_healed:
                attempt.close()
                self._end_attempt(attempt, fault)
        last = self._attempt()
        try:
            last.wait_for_steps(1, START_WITHIN_S)
            status = last.end(within_s=self.training.steps * STEP_WITHIN_S)
        finally:
            last.close()
        self._end_attempt(last)
        self._judge(status, last)

    def _attempt(self) -> Attempt:
        """The run that goes on, where the last fault has healed; else another start of the same command."""
        if self._running is None:
            self._running = Attempt(self.folder, len(self._attempts) + 1, self.training.command())
        return self._running

    def _hit(self, attempt: Attempt, fault: Fault) -> None:
        target = TARGETS[fault.target]
        if not attempt.wait_for(lambda: bool(attempt.find(target.titles)), START_WITHIN_S):
            tail = attempt.log.read_text(errors="replace").splitlines()[-5:]
            fault.problems.append("the process to kill never appeared: " + " / ".join(tail))
            return
        if fault.moment == "start":
            attempt.wait_for_steps(1, fault.delay_s * 60)
        else:
            attempt.wait_for_steps(fault.after_steps, START_WITHIN_S)
            attempt.wait_for_moment(fault.moment, fault.delay_s)
        victims = attempt.find(target.titles)
        segments = _segments(process.pid for process in cpu_run.marked(attempt.mark))
        fault.killed_after_step = attempt.last_step
        killed_at = time.monotonic()
        if target.asks:
            os.killpg(attempt.process.pid, target.send)
        else:
            for victim in victims:
                victim.send_signal(signal.SIGKILL)
        if self.kind.mode in target.heals_in and (fault.moment != "start" or target.heals_at_start):
            self._see_it_heal(attempt, fault, killed_at)
            return
        try:
            fault.status = attempt.process.wait(END_WITHIN_S)
            fault.ended_after_s = round(time.monotonic() - killed_at, 1)
        except subprocess.TimeoutExpired:
            fault.problems.append(f"the run did not end within {END_WITHIN_S:.0f} s")
        fault.error = _error(attempt.log.read_text(errors="replace"), target.words)
        if fault.ended_after_s is not None:
            self._check_end(attempt, fault, segments)

    @staticmethod
    def _see_it_heal(attempt: Attempt, fault: Fault, killed_at: float) -> None:
        """The step after the one that may have had its rollouts already shows that there are new ones."""
        enough = fault.killed_after_step + STALENESS_STEPS + 2
        fault.has_healed = attempt.wait_for(lambda: attempt.last_step >= enough, HEAL_WITHIN_S)
        fault.recovered_after_s = round(time.monotonic() - killed_at, 1)
        if attempt.process.poll() == 0:
            fault.has_healed = True  # it was at its end
        if not fault.has_healed:
            fault.problems.append("the run did not go on by itself")

    @staticmethod
    def _check_end(attempt: Attempt, fault: Fault, segments: set[Path]) -> None:
        target = TARGETS[fault.target]
        if fault.status == 0:
            fault.problems.append("the run ended as if nothing had happened")
        if target.words and not fault.error:
            fault.problems.append("no error names what died")
        # Python's own status where the driver was still importing verl, before anything of ours was there.
        was_importing = "KeyboardInterrupt" in attempt.log.read_text(errors="replace").splitlines()
        if target.asks and fault.status != 128 + target.send and not was_importing:
            fault.problems.append(f"it ended with status {fault.status} after {fault.target}")
        if target.asks and fault.ended_after_s > ASKED_END_WITHIN_S:
            fault.problems.append(f"it took more than {ASKED_END_WITHIN_S:.0f} s to end")
        deadline = time.monotonic() + 20
        while (alive := cpu_run.marked(attempt.mark)) and time.monotonic() < deadline:
            time.sleep(0.2)
        if alive:
            fault.problems.append(f"processes stay: {[title_of(process)[:60] for process in alive]}")
        fault.left = sorted(segment.name for segment in segments if segment.exists())
        # Nobody is left to clean up if the driver is killed.
        if fault.left and fault.target not in ("driver", "all processes"):
            fault.problems.append(f"shared memory stays: {fault.left}")
        for segment in segments:
            segment.unlink(missing_ok=True)

    def _end_attempt(self, attempt: Attempt, fault: Fault | None = None) -> None:
        """Read what it has left; `fault` has ended it."""
        self._running = None
        if self._ended:
            self._ended[-1].recovered_after_s = attempt.first_step_s
        if fault is not None:
            self._ended.append(fault)
        lines = self.training.ledger.read_text().splitlines() if self.training.ledger.exists() else []
        known = sum(len(attempt) for attempt in self._attempts)
        self._attempts.append([_parse(line) for line in lines[known:]])
        before = set[str]().union(*self._journaled.values())
        new = {
            name: uids for name, uids in _finished_groups(self.training.journal).items() if name not in self._journaled
        }
        self._generated_again += sorted(before & set[str]().union(*new.values()))
        self._journaled |= new

    def _judge(self, status: int | None, last: Attempt) -> None:
        problems = []
        if status != 0:
            tail = "\n".join(last.log.read_text(errors="replace").splitlines()[-40:])
            problems.append(f"the last attempt ended with {status}:\n{tail}")
        promise = self.training.promise()
        problems += broken(self._attempts, promise)
        if self.kind.has_journal and not self._journaled:
            problems.append("there is no journal")
        if self._generated_again:
            problems.append(f"generated again though the journal has them: {self._generated_again[:4]}")
        for fault in self.faults:
            fault.problems += problems
        for fault, redone in zip(self._ended, redone_steps(self._attempts), strict=True):
            fault.redone_steps = redone
            # Those since the last checkpoint, with the one in progress; a run that is asked to end finishes its step.
            allowed = 0 if TARGETS[fault.target].asks else SAVE_EVERY
            if redone > allowed:
                fault.problems.append(f"{redone} steps were trained again, at most {allowed} may be")


def _parse(line: str) -> dict:
    try:
        return json.loads(line)
    except ValueError:
        return {}  # cut off by the kill


def _finished_groups(journal: Path) -> dict[str, set[str]]:
    """Groups in each file of the journal; an agent loop worker writes one as soon as it is generated."""
    return {path.name: {decode(data).uid for data in read_frames(path)} for path in journal.glob("*.rows")}


def _error(output: str, words: tuple[str, ...]) -> str:
    """The last line that says that one of `words` died; Ray names the class of an actor in the line after."""
    lines = output.splitlines()
    for line, after in reversed(list(zip(lines, [*lines[1:], ""], strict=True))):
        if re.search("[Dd]ied|[Dd]ead|not answered", line) and any(word in line + after for word in words):
            return re.sub(r"\x1b\[\d+m", "", line).strip()[:200]
    return ""


def run_all(seeds: list[int], out: Path, say: Callable[[str], None] = print) -> list[Fault]:
    """Let the faults of `seeds` happen, kind by kind; returns them in the order of the seeds."""
    faults = [Fault.draw(seed) for seed in seeds]
    for kind in (kind for row in KINDS for kind in row):
        if of_kind := [fault for fault in faults if fault.kind == kind]:
            Campaign(out / kind, of_kind, say).run()
            write([asdict(fault) for fault in faults], out / "faults.json")
    return faults


def write(records: list, path: Path) -> None:
    path.write_text(json.dumps(records, indent=2) + "\n")
