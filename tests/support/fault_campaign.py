"""Kills the processes of real training runs, one after the other, restarts them, and checks what was trained on.

    make faults SEEDS=1-12

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
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import cpu_run
import failing_rewards
import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table
from torchdata.stateful_dataloader.sampler import RandomSampler
from trained_rows import Promise, broken, redone_steps

from verl_m2po.launch.signals import _segments
from verl_m2po.staleness.restart.frames import decode, read_frames
from verl_m2po.tasks import arithmetic, tiny_model

BATCH, MINI_BATCH, RESPONSES, STALENESS_STEPS, SAVE_EVERY = 8, 4, 4, 2, 2
PROMPTS, DATA_SEED = 512, 1

END_WITHIN_S = 120.0
"""A run that lost a process must have ended by itself after that."""

ASKED_END_WITHIN_S = 30.0

START_WITHIN_S, STEP_WITHIN_S = 600.0, 120.0

HEAL_WITHIN_S = 300.0
"""A run that heals must have trained on new rollouts after that."""

SEPARATE = ("actor_rollout_ref.hybrid_engine=false", "actor_rollout_ref.rollout.nnodes=1")


@dataclass(frozen=True)
class Kind:
    """A kind of training run.

    Args:
        mode: trainer mode.
        staleness_steps: trainer steps; exact, or the bound.
        has_journal: whether what was generated outlives a crash.
        masks: whether a trajectory of every tenth prompt fails, and is masked.
        overrides: further ones.
    """

    mode: str
    staleness_steps: int = STALENESS_STEPS
    has_journal: bool = False
    masks: bool = False
    overrides: tuple[str, ...] = ()


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


@dataclass(frozen=True)
class Target:
    """What is hit.

    Args:
        titles: how Ray and vLLM title its process; "" is every process of the run.
        words: one of them must stand in an error; none where nobody is left to say anything.
        send: other than SIGKILL, it goes to the driver's process group, as terminals and batch systems send it.
        heals_in: trainer modes that go on without a restart once they train.
    """

    titles: tuple[str, ...]
    words: tuple[str, ...] = ()
    send: signal.Signals = signal.SIGKILL
    heals_in: tuple[str, ...] = ()

    @property
    def asks(self) -> bool:
        """Whether the run is asked to end, and may save a checkpoint first."""
        return self.send != signal.SIGKILL


_SEPARATE = ("stale_k_separate", "bounded_async")

# Seeds go round in this order.
TARGETS = {
    "rollout engine": Target(("VLLM::EngineCore",), ("EngineCore", "EngineDead", "rollout server"), heals_in=_SEPARATE),
    "actor worker": Target(("ray::WorkerDict",), ("actor worker", "WorkerDict")),
    "agent loop worker": Target(
        ("ray::StalenessAgent", "ray::AgentLoop"),
        ("agent loop worker", "AgentLoopWorker"),
        heals_in=("stale_k", *_SEPARATE),
    ),
    "TransferQueue storage": Target(("ray::SimpleStorageUnit",), ("TransferQueue storage", "SimpleStorageUnit")),
    "rollout server": Target(("ray::vLLMHttpServer",), ("rollout server", "vLLMHttpServer"), heals_in=_SEPARATE),
    "all processes": Target(("",)),
    "SIGTERM": Target(("main_ppo",), send=signal.SIGTERM),
    "reward worker": Target(("ray::RewardLoopWorker",), ("reward worker", "RewardLoopWorker")),
    "TransferQueue controller": Target(
        ("ray::TransferQueueController",), ("TransferQueue controller", "QueueController")
    ),
    "trainer": Target(("ray::TaskRunner",), ("TaskRunner",)),
    "Ctrl-C": Target(("main_ppo",), send=signal.SIGINT),
    "driver": Target(("main_ppo",)),
}

# In the midst of what, by the method that the actor worker's title shows; "" is none, so that generation is waited for.
MOMENTS = {"start": None, "generation": "", "training": "update_actor", "saving": "save_checkpoint"}


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
        kinds = list(KINDS[(seed - 1) // len(TARGETS) % len(KINDS)])
        return cls(
            seed=seed,
            kind=kinds[seed // 4 % len(kinds)],
            target=list(TARGETS)[seed % len(TARGETS)],
            moment=list(MOMENTS)[(seed + seed // 4) % len(MOMENTS)],
            after_steps=rng.choice([1, 2, 3]),
            delay_s=round(rng.uniform(0.0, 0.5), 3),
        )


def chain(kind: str, kills: int, seed: int) -> list[Fault]:
    """Faults from which a run of `kind` heals, one after the other: processes, moments and delays are chance."""
    rng = random.Random(seed)
    mode = next(row[kind].mode for row in KINDS if kind in row)
    targets = [name for name, target in TARGETS.items() if mode in target.heals_in]
    moments = [moment for moment in MOMENTS if moment != "start"]
    return [
        Fault(seed, kind, rng.choice(targets), rng.choice(moments), 1, round(rng.uniform(0.0, 0.5), 3))
        for _ in range(kills)
    ]


class Attempt:
    """One start of the run's command."""

    def __init__(self, folder: Path, number: int, command: list[str]) -> None:
        _wait_for_memory()
        self.mark = uuid.uuid4().hex
        self.metrics = folder / f"attempt-{number}.jsonl"
        self.log = folder / f"attempt-{number}.txt"
        self.began_at = time.monotonic()
        self.first_step_s: float | None = None
        self._stream = self.log.open("w")
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=self._stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                cpu_run.MARK: self.mark,
                "VERL_FILE_LOGGER_PATH": str(self.metrics),
                "TENSORBOARD_DIR": str(folder / "tensorboard"),
            },
        )

    @property
    def steps(self) -> int:
        """Trainer steps that it has logged."""
        return len(self.metrics.read_text().splitlines()) if self.metrics.exists() else 0

    @property
    def last_step(self) -> int:
        """The last trainer step that it has logged, 0 for none."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def find(self, titles: tuple[str, ...]) -> list[psutil.Process]:
        return [p for p in cpu_run.marked(self.mark) if any(title in _title(p) for title in titles)]

    def wait_for(self, what: Callable[[], bool], within_s: float, every_s: float = 0.2) -> bool:
        """Whether it happened before the time was over or the run ended."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and self.process.poll() is None:
            if what():
                return True
            time.sleep(every_s)
        return False

    def wait_for_steps(self, steps: int, within_s: float) -> bool:
        """Wait until it has logged that many; notes when the first one came."""
        if self.first_step_s is None and self.wait_for(lambda: self.steps > 0, within_s):
            self.first_step_s = round(time.monotonic() - self.began_at, 1)
        return self.wait_for(lambda: self.steps >= steps, within_s)

    def end(self, within_s: float) -> int | None:
        """Its exit status; None if it had to be killed."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.close()

    def close(self) -> None:
        cpu_run.kill_marked(self.mark, grace_s=20 if self.process.poll() is not None else 0)
        self.process.wait()
        self._stream.close()


def _wait_for_memory() -> None:
    """The preflight refuses a run without 8 GiB, and what was killed before may not have given its memory back."""
    deadline = time.monotonic() + START_WITHIN_S
    while psutil.virtual_memory().available < 9 * 2**30 and time.monotonic() < deadline:
        time.sleep(1.0)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class Campaign:
    """One training run and the faults that hit it.

    Args:
        folder: of everything that it writes.
        faults: in their order.
        say: told of each.
        kind: of the run; None: that of the first fault.
        steps: trainer steps; None: as many as the faults need.
    """

    def __init__(
        self,
        folder: Path,
        faults: list[Fault],
        say: Callable[[str], None] = print,
        kind: Kind | None = None,
        steps: int | None = None,
    ) -> None:
        self.folder, self.faults, self._say = folder, faults, say
        self.kind = kind or next(row[faults[0].kind] for row in KINDS if faults[0].kind in row)
        # Long enough for every fault to hit before the end, and for the steps that show that one has healed.
        enough = sum(
            fault.after_steps + SAVE_EVERY + STALENESS_STEPS + 2 for fault in faults if fault.moment != "start"
        )
        enough += 4
        self.steps = enough if steps is None else steps
        self.prompts = max(PROMPTS, (self.steps + 2 * STALENESS_STEPS) * BATCH)
        self.ledger = folder / "ledger.jsonl"
        self._journal = folder / "journal"
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
            status = last.end(within_s=self.steps * STEP_WITHIN_S)
        finally:
            last.close()
        self._end_attempt(last)
        self._judge(status, last)

    def _attempt(self) -> Attempt:
        """The run that goes on, where the last fault has healed; else another start of the same command."""
        if self._running is None:
            self._running = Attempt(self.folder, len(self._attempts) + 1, self.command())
        return self._running

    def command(self) -> list[str]:
        """That of every attempt."""
        data = self.folder / "data"
        arithmetic.write_parquet(data, train_rows=self.prompts, validation_rows=8)
        mode = f"trainer.v1.{self.kind.mode}"
        return [
            sys.executable,
            "-m",
            "verl.trainer.main_ppo",
            "--config-name=arithmetic",
            "hardware=cpu",
            "ray_kwargs.ray_init.address=local",
            f"actor_rollout_ref.model.path={tiny_model.build()}",
            f"data.train_files={data / 'train.parquet'}",
            f"data.val_files={data / 'validation.parquet'}",
            f"data.seed={DATA_SEED}",
            f"data.train_batch_size={BATCH}",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={MINI_BATCH}",
            f"actor_rollout_ref.rollout.n={RESPONSES}",
            "trainer.val_before_train=false",
            "trainer.test_freq=-1",
            f"trainer.total_training_steps={self.steps}",
            f"trainer.v1.trainer_mode={self.kind.mode}",
            f"{mode}.staleness_updates={self.kind.staleness_steps * BATCH // MINI_BATCH}",
            f"{mode}.ledger_path={self.ledger}",
            f"{mode}.journal={str(self.kind.has_journal).lower()}",
            f"{mode}.journal_path={self._journal}",
            *(self._failing_rewards(mode) if self.kind.masks else ()),
            f"trainer.save_freq={SAVE_EVERY}",
            "trainer.resume_mode=auto",
            f"trainer.default_local_dir={self.folder / 'checkpoints'}",
            *self.kind.overrides,
        ]

    @staticmethod
    def _failing_rewards(mode: str) -> tuple[str, ...]:
        function = failing_rewards.compute_score_failing_once
        return (
            f"reward.custom_reward_function.path={failing_rewards.__file__}",
            f"reward.custom_reward_function.name={function.__name__}",
            f"{mode}.on_failed_trajectory=mask",
        )

    def _hit(self, attempt: Attempt, fault: Fault) -> None:
        target = TARGETS[fault.target]
        if not attempt.wait_for(lambda: bool(attempt.find(target.titles)), START_WITHIN_S):
            tail = attempt.log.read_text(errors="replace").splitlines()[-5:]
            fault.problems.append("the process to kill never appeared: " + " / ".join(tail))
            return
        if fault.moment == "start":
            attempt.wait_for_steps(1, fault.delay_s * 60)
        else:
            self._wait_for_moment(attempt, fault)
        victims = attempt.find(target.titles)
        segments = _segments(process.pid for process in cpu_run.marked(attempt.mark))
        fault.killed_after_step = attempt.last_step
        killed_at = time.monotonic()
        if target.asks:
            os.killpg(attempt.process.pid, target.send)
        else:
            for victim in victims:
                victim.send_signal(signal.SIGKILL)
        if fault.moment != "start" and self.kind.mode in target.heals_in:
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

    def _wait_for_moment(self, attempt: Attempt, fault: Fault) -> None:
        attempt.wait_for_steps(fault.after_steps, START_WITHIN_S)
        workers = attempt.find(("ray::WorkerDict",))
        method = MOMENTS[fault.moment]

        def is_now() -> bool:
            titles = [_title(worker) for worker in workers]
            return any(method in title if method else "." not in title for title in titles)

        attempt.wait_for(is_now, STEP_WITHIN_S, every_s=0.005)
        time.sleep(fault.delay_s * (0.4 if method else 1.0))

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
            fault.problems.append(f"processes stay: {[_title(process)[:60] for process in alive]}")
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
        lines = self.ledger.read_text().splitlines() if self.ledger.exists() else []
        known = sum(len(attempt) for attempt in self._attempts)
        self._attempts.append([_parse(line) for line in lines[known:]])
        before = set[str]().union(*self._journaled.values())
        new = {name: uids for name, uids in _finished_groups(self._journal).items() if name not in self._journaled}
        self._generated_again += sorted(before & set[str]().union(*new.values()))
        self._journaled |= new

    def promise(self) -> Promise:
        """What it trains on when nothing happens to it."""
        order = list(RandomSampler(range(self.prompts), generator=torch.Generator().manual_seed(DATA_SEED)))
        masked = frozenset(filter(failing_rewards.fails_once, order)) if self.kind.masks else frozenset()
        return Promise(self.kind.mode, self.kind.staleness_steps, self.steps, BATCH, RESPONSES, order, masked)

    def _judge(self, status: int | None, last: Attempt) -> None:
        problems = []
        if status != 0:
            tail = "\n".join(last.log.read_text(errors="replace").splitlines()[-40:])
            problems.append(f"the last attempt ended with {status}:\n{tail}")
        promise = self.promise()
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


def parse_seeds(text: str) -> list[int]:
    """`1-12`, `3` or `1,4,9`."""
    parts = [part.split("-") for part in text.split(",")]
    return [seed for part in parts for seed in range(int(part[0]), int(part[-1]) + 1)]


def run_all(seeds: list[int], out: Path, say: Callable[[str], None] = print) -> list[Fault]:
    """Let the faults of `seeds` happen, kind by kind; returns them in the order of the seeds."""
    faults = [Fault.draw(seed) for seed in seeds]
    for kind in (kind for row in KINDS for kind in row):
        if of_kind := [fault for fault in faults if fault.kind == kind]:
            Campaign(out / kind, of_kind, say).run()
            _write(faults, out / "faults.json")
    return faults


def run_chains(seed: int, kills: int, out: Path) -> list[Fault]:
    """A chain of `kills` in one run of each separate mode."""
    faults = []
    for kind in _SEPARATE:
        faults += (drawn := chain(kind, kills, seed))
        Campaign(out / kind, drawn).run()
        _write(faults, out / "faults.json")
    return faults


def _write(faults: list[Fault], path: Path) -> None:
    path.write_text(json.dumps([asdict(fault) for fault in faults], indent=2) + "\n")


def table_of(faults: list[Fault]) -> Table:
    """One row per fault."""
    table = Table("seed", "run", "killed", "during", "after step", "ended after, s", "steps redone", "lost")
    table.add_column("first new step, s after the restart")
    for fault in faults:
        ended, recovered = ("-" if s is None else f"{s:.0f}" for s in (fault.ended_after_s, fault.recovered_after_s))
        ended = "went on" if fault.has_healed else ended
        lost = "nothing" if not fault.problems else "; ".join(fault.problems)[:300]
        cells = (fault.seed, fault.kind, fault.target, fault.moment, fault.killed_after_step, ended, fault.redone_steps)
        table.add_row(*map(str, cells), lost, recovered)
    return table


def main(
    seeds: Annotated[str, typer.Option(help="Faults: 1-12, or 1,4,9")] = "1-12",
    out: Annotated[Path, typer.Option(help="Folder for logs, checkpoints and faults.json")] = Path("outputs/faults"),
    kills: Annotated[
        int, typer.Option(help="Instead: so many kills in one run, which heals, of each separate mode")
    ] = 0,
) -> None:
    """Kill processes of real training runs, restart them, and check that nothing was lost or trained twice."""
    out = out.resolve()
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty: a run in it would be resumed. Name another folder or remove it")
    out.mkdir(parents=True, exist_ok=True)
    faults = run_chains(parse_seeds(seeds)[0], kills, out) if kills else run_all(parse_seeds(seeds), out)
    Console(width=200).print(table_of(faults))
    print(f"{out / 'faults.json'}")
    raise SystemExit(any(fault.problems for fault in faults))


if __name__ == "__main__":
    typer.run(main)
