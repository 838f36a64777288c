"""One training run and many kills, one after the other, from all of which it must go on by itself to its last step.

    make faults KILLS=30 SEEDS=1

What hits it, `kill_plan` draws. Where several processes are of the drawn kind, the drawn number chooses among those
that live at that moment, the oldest first.
"""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import cpu_run
import lossy_push
from fault_runs import (
    HEAL_WITHIN_S,
    SEPARATE,
    SEPARATE_MODES,
    STALENESS_STEPS,
    START_WITHIN_S,
    STEP_WITHIN_S,
    TARGETS,
    Attempt,
    Kind,
    TrainingRun,
)
from kill_plan import IN_REPLACEMENT, MISSED, Strike
from mode_runs import paced
from trained_rows import broken

from benchmarks.paced import SECONDS_PER_TOKEN
from benchmarks.paced.agent_loop import Lengths
from verl_m2po.tasks import arithmetic

EVERY_STEPS = 3

STEPS_PER_STRIKE, STEPS_PER_REPLACEMENT = 6, 40
"""The run has as many trainer steps for each: many go by while a process starts in whose place another one is hit."""

LONGEST_TOKENS = 32

SLOW_STEP_S = 10.0
"""A trainer step on a machine that others use."""

END_WITHIN_S = 30.0
"""A run that has not gone on may still say why."""

WAITED = "staleness/trainer_idle_s"
SUMMED = ("replicas_lost", "groups_moved", "lost_generation_s")
"""Metrics of the steps from a strike to the next, by their names without ``staleness/``."""

LINE = 300
"""Characters of a line of the log in a report."""

QUESTION = "M2PO_TEST_POISONED_QUESTION"
"""See poison.py, which only an engine can import."""


def steps_for(strikes: list[Strike]) -> int:
    """Trainer steps of a run that all of them hit."""
    in_replacement = sum(strike.pattern == IN_REPLACEMENT for strike in strikes)
    return STEPS_PER_STRIKE * len(strikes) + STEPS_PER_REPLACEMENT * in_replacement + 10


@dataclass
class Chain:
    """One training run, and what strikes it.

    Args:
        folder: of everything that it writes.
        mode: trainer mode.
        strikes: in their order.
        say: told of each.
        steps: trainer steps; 0: as many as the strikes need.
        staleness_steps: trainer steps; exact, or the bound.
        every_steps: trainer steps from one strike to the next, the first one too.
        seconds_per_token: that an engine takes at least; 0.06 makes generation take two seconds.
        more: further overrides.
        poisoned: the place in the data loader's order of a prompt that kills the engines it is given to; None: none.
    """

    folder: Path
    mode: str
    strikes: list[Strike]
    say: Callable[[str], None] = print
    steps: int = 0
    staleness_steps: int = STALENESS_STEPS
    every_steps: int = EVERY_STEPS
    seconds_per_token: float = 0.06
    more: tuple[str, ...] = ()
    poisoned: int | None = None
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        kind = Kind(self.mode, self.staleness_steps, overrides=(*self._devices(), *self._pace_and_size(), *self.more))
        self.training = TrainingRun(self.folder, kind, self.steps or steps_for(self.strikes))
        self._keep_from_one = self.folder / "next-push-misses-one"

    def _devices(self) -> tuple[str, ...]:
        """Two servers, where they have devices of their own."""
        two = "actor_rollout_ref.rollout.n_gpus_per_node=2"
        return (*SEPARATE, two) if self.mode in SEPARATE_MODES else ()

    def _pace_and_size(self) -> tuple[str, ...]:
        processor = "poison:Poison" if self.poisoned is not None else "benchmarks.paced.token_time:TokenTime"
        lengths = [Lengths(1, median=16, sigma=0.5, longest=LONGEST_TOKENS)]
        processors = "+actor_rollout_ref.rollout.engine_kwargs.vllm.logits_processors"
        return (
            *paced(self.folder, lengths=lengths),
            f"data.max_response_length={LONGEST_TOKENS}",
            "trainer.max_actor_ckpt_to_keep=1",
            f"{processors}={processor}",
        )

    def run(self) -> None:
        """Start, strike, ..., and judge; fills in `strikes` and `problems`."""
        pace = {SECONDS_PER_TOKEN: str(self.seconds_per_token)}
        environment = {**pace, **lossy_push.environment(self._keep_from_one), **self._poison()}
        self.attempt = Attempt(self.folder, 1, self.training.command(), environment)
        try:
            self._strike_all()
            status = self._end()
            left = [] if status is None else self._left_over()
        finally:
            self.attempt.close()
        self._account()
        self._judge(status, left)

    def _end(self) -> int | None:
        """Its exit status; None if it does not end by itself."""
        try:
            return self.attempt.process.wait(END_WITHIN_S if self.problems else self.training.steps * STEP_WITHIN_S)
        except subprocess.TimeoutExpired:
            return None

    def _poison(self) -> dict[str, str]:
        if (prompt := self._poisoned_prompt) is None:
            return {}
        question, _ = arithmetic.question_and_answer(*arithmetic.problem(prompt, split="train"))
        return {QUESTION: question}

    @property
    def _poisoned_prompt(self) -> int | None:
        return None if self.poisoned is None else self.training.promise().order[self.poisoned]

    def _strike_all(self) -> None:
        interval_s = self.every_steps * SLOW_STEP_S
        step, within_s = self.every_steps, START_WITHIN_S + interval_s
        for number, strike in enumerate(self.strikes, 1):
            if not self.attempt.wait_for(lambda step=step: self.attempt.last_step >= step, within_s):
                self.problems.append(f"before strike {number} the run does not come to trainer step {step}")
                return
            self.attempt.wait_for_moment(strike.moment, strike.delay_s)
            strike.after_step = self.attempt.last_step
            self._strike(strike)
            what = f"{strike.pattern}: {' and '.join(strike.targets)}" if strike.targets else strike.pattern
            self.say(f"{self.mode}, {number} of {len(self.strikes)}, step {strike.after_step}, {strike.moment}: {what}")
            step = self.attempt.last_step + self.every_steps
            within_s = HEAL_WITHIN_S + interval_s

    def _strike(self, strike: Strike) -> None:
        if strike.pattern == MISSED:
            self._keep_from_one.touch()
            if not self.attempt.wait_for(lambda: not self._keep_from_one.exists(), HEAL_WITHIN_S):
                self.problems.append("nobody missed a push")
            return
        if strike.pattern == IN_REPLACEMENT:
            before = self._pids(strike.targets[0])
            self._kill(strike.targets[0], strike.choices[0])
            self._wait_for_another(strike.targets[0], before)
            time.sleep(strike.start_s)
            self._kill(strike.targets[1], strike.choices[1])
            return
        for target, choice in zip(strike.targets, strike.choices, strict=False):
            self._kill(target, choice)

    def _kill(self, target: str, choice: float) -> None:
        titles = TARGETS[target].titles
        if not self.attempt.wait_for(lambda: bool(self.attempt.find(titles)), HEAL_WITHIN_S):
            self.problems.append(f"no {target} to kill")
            return
        victims = sorted(self.attempt.find(titles), key=lambda process: process.pid)
        if victims:  # else it has ended by itself in the meantime
            victims[int(choice * len(victims))].kill()

    def _pids(self, target: str) -> set[int]:
        return {process.pid for process in self.attempt.find(TARGETS[target].titles)}

    def _wait_for_another(self, target: str, than: set[int]) -> None:
        if not self.attempt.wait_for(lambda: bool(self._pids(target) - than), HEAL_WITHIN_S):
            self.problems.append(f"no {target} was started in the place of another one")

    def _left_over(self) -> list[str]:
        """Processes that stay when the run has ended."""
        deadline = time.monotonic() + 20
        while (left := cpu_run.marked(self.attempt.mark)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [" ".join(process.cmdline())[:60] for process in left]

    @property
    def step_metrics(self) -> list[dict]:
        """The metrics of every trainer step."""
        return [line["data"] | {"step": line["step"]} for line in cpu_run.read_steps(self.attempt.metrics)]

    def total(self, metric: str) -> float:
        """The sum of a metric over the run."""
        return sum(step.get(metric, 0.0) for step in self.step_metrics)

    def _account(self) -> None:
        """What the steps after each strike say, up to the next one."""
        ends = [strike.after_step for strike in self.strikes[1:]] + [self.training.steps]
        usual_s = median(step[WAITED] for step in self.step_metrics) if self.step_metrics else 0.0
        for strike, end in zip(self.strikes, ends, strict=False):
            steps = [step for step in self.step_metrics if strike.after_step < step["step"] <= end]
            for name in SUMMED:
                setattr(strike, name, round(sum(step.get(f"staleness/{name}", 0.0) for step in steps), 1))
            # On shared devices the trainer waits in each step, for a batch to be generated.
            strike.trainer_waited_s = round(sum(max(0.0, step[WAITED] - usual_s) for step in steps), 1)

    def _judge(self, status: int | None, left: list[str]) -> None:
        output = self.attempt.log.read_text(errors="replace")
        if status != 0:
            tail = "\n".join(line[:LINE] for line in output.splitlines()[-40:])
            self.problems.append(f"the run ended with status {status}:\n{tail}")
        if left:
            self.problems.append(f"processes stay: {left}")
        lines = self.training.ledger.read_text().splitlines() if self.training.ledger.exists() else []
        self.problems += broken([[json.loads(line) for line in lines]], self.training.promise())
        kept = self.folder / "checkpoints" / "poisoned.jsonl"
        set_aside = list(map(json.loads, kept.read_text().splitlines())) if kept.exists() else []
        if set_aside != ([] if self.poisoned is None else [self._poisoned_prompt]):
            self.problems.append(f"these prompts were set aside: {set_aside}; this one kills: {self._poisoned_prompt}")
        missed = sum(strike.pattern == MISSED for strike in self.strikes)
        if (found := output.count("after the push of weight version")) < missed:
            self.problems.append(f"{missed} pushes did not arrive at one server, {found} such servers were left")
