"""The trainer's loop: generate what the staleness rule admits, train on what it selects, log as verl does."""

# transformers and TensorDict annotate wider, or narrower, types than they return.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import copy
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl import DataProto
from verl.trainer.ppo.metric_utils import compute_data_metrics
from verl.utils.metric import reduce_metrics
from verl.utils.tracking import Tracking

from verl_m2po.ground.fields import AGE_FIELD
from verl_m2po.one_process.claim import claim
from verl_m2po.one_process.learner import Learner
from verl_m2po.one_process.rollouts import Generator, Problems, with_advantages
from verl_m2po.one_process.setup import Setup
from verl_m2po.staleness import outcomes
from verl_m2po.staleness.account.bound import move_bound
from verl_m2po.staleness.account.metrics import StalenessMetrics
from verl_m2po.staleness.rule.adaptive_async import AdaptiveAsync
from verl_m2po.staleness.rule.records import Row, Selection
from verl_m2po.staleness.rule.reusing import Reusing
from verl_m2po.staleness.rule.rules import StalenessRule
from verl_m2po.staleness.rule.units import version_at_step
from verl_m2po.tasks import supervision

TRAINING_PROBLEMS, VALIDATION_PROBLEMS = 8192, 512
LOG = "attempt-1.jsonl"


@dataclass
class Buffer:
    """Finished rollouts: the rule that runs through verl use, and their tokens by group.

    Args:
        rule: Says what may be generated and what is trained.
        metrics: Of `staleness/*`.
    """

    rule: StalenessRule
    metrics: StalenessMetrics

    def __post_init__(self) -> None:
        self._groups: dict[str, TensorDict] = {}
        self._selection: Selection | None = None
        self._admitted = 0

    def fill(self, version: int, generate: Callable[[int], list[TensorDict]]) -> None:
        """Generate all that the rule admits at weight `version`, a batch at a time.

        Args:
            version: Weight version that generates.
            generate: Gives that many groups of responses.
        """
        while count := min(self.rule.admissible(version), self.rule.batch_size):
            self.metrics.admitted(count)
            for group in generate(count):
                uid = str(self._admitted)
                self._admitted += 1
                self.rule.admit(uid, version)
                self.rule.finish(uid, _rows(uid, group, version))
                self._groups[uid] = group

    def take(self, version: int, generate: Callable[[int], list[TensorDict]]) -> list[TensorDict]:
        """The groups to train from weight `version`, with the age of their rows in optimizer updates.

        Args:
            version: Weight version that generates all that the rule admits.
            generate: Gives that many groups of responses.
        """
        while True:
            self.fill(version, generate)
            selection = self.rule.select(version, self.rule.batch_size)
            assert selection is not None, "what the rule admits is generated at once"
            for group in selection.evicted:
                self.metrics.dropped(group)
                del self._groups[group.ticket.uid]
            if selection.groups:
                return self._hand_out(selection, version)

    def _hand_out(self, selection: Selection, version: int) -> list[TensorDict]:
        self._selection = selection
        self.metrics.trained(selection.groups, version, selection.oldest_version, len(selection.replayed))
        groups = []
        for group in selection.groups:
            rollouts = self._groups[group.ticket.uid]
            age = self.metrics.clock.age_updates(group.min_version, version)
            rollouts[AGE_FIELD] = torch.full((len(rollouts),), age)
            groups.append(rollouts)
        for group in (*selection.used_up, *selection.retired):
            del self._groups[group.ticket.uid]
        return groups

    def judge(self, data: DataProto, step: int) -> None:
        """Tell the rule what the batch that was taken has shown, where that decides what is trained again."""
        if not self.rule.needs_outcomes:
            return
        assert self._selection is not None and isinstance(self.rule, Reusing)
        uids = [group.ticket.uid for group in self._selection.groups for _ in group.rows]
        scores, mask = data.batch["rm_scores"].sum(-1), data.batch["response_mask"].bool()
        batch = outcomes.Batch(uids, scores, data.batch["advantages"], mask)
        if (changed := batch.judged(self.rule, self._selection.replayed, step)) is not None:
            data.batch["advantages"], data.batch["response_mask"] = changed


def _rows(uid: str, group: TensorDict, version: int) -> tuple[Row, ...]:
    prompt = group["prompts"].shape[1]
    lengths = group["response_mask"].sum(-1).tolist()
    return tuple(Row(f"{uid}_{i}_0", prompt, n, ((version, n),)) for i, n in enumerate(lengths))


def data_metrics(data: DataProto) -> dict[str, float]:
    """verl's metrics of a batch, with the true lengths that its v1 trainer adds to it before: padding is no token.

    Args:
        data: What `with_advantages` returns.
    """
    batch = data.batch
    batch["response_length"] = batch["response_mask"].sum(-1).float()
    # Prompts are all of one length.
    batch["prompt_length"] = torch.full_like(batch["response_length"], batch["prompts"].shape[1])
    tokens = float((batch["prompt_length"] + batch["response_length"]).sum())
    return compute_data_metrics(data, use_critic=False) | {"perf/total_num_tokens": tokens}


class Bench:
    """One run: model, problems, buffer and learner.

    Args:
        setup: What to do.
        model_folder: The base model, as `tiny_model.build` makes it.
        digits: Digits of the numbers of the task.
    """

    def __init__(self, setup: Setup, model_folder: Path, digits: int) -> None:
        seed = setup.config.actor_rollout_ref.rollout.seed
        torch.manual_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        self.setup = setup
        self.model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        problems = Problems.make(tokenizer, setup.task, TRAINING_PROBLEMS, "train", digits)
        self._held_out = Problems.make(tokenizer, setup.task, VALIDATION_PROBLEMS, "validation", digits)
        self._order = problems.order(setup.config.data.seed or 0)
        self._generator = Generator(self.model, tokenizer, problems, setup)
        self.learner = Learner(self.model, setup)
        self._buffer = Buffer(setup.make_rule(), StalenessMetrics(setup.clock))

    def batch(self, step: int) -> Any:
        """What trainer step `step` (from 1) trains on, as a DataProto; generates all that is due before it."""
        version = version_at_step(step)
        groups = self._buffer.take(version, lambda count: self._generator.generate(list(islice(self._order, count))))
        data = with_advantages(groups, self.setup, self.learner.log_probs)
        self._buffer.judge(data, step)
        return data

    def step(self, step: int) -> dict[str, float]:
        """One trainer step (from 1); its metrics by verl's names."""
        began = time.perf_counter()
        data = self.batch(step)
        generated = time.perf_counter()
        metrics: dict[str, Any] = self.learner.train_step(data.batch)
        ended = time.perf_counter()
        metrics = reduce_metrics(metrics) | data.meta_info["metrics"] | data_metrics(data)
        rule = self._buffer.rule
        if isinstance(rule, AdaptiveAsync):
            # One process waits for all that it generates.
            metrics |= move_bound(rule, self.setup.clock, metrics, (generated - began) / (ended - began))
        metrics |= self._buffer.metrics.take(rule.in_flight, rule.ready)
        return metrics | {
            "training/global_step": step,
            "timing_s/gen": generated - began,
            "timing_s/update_actor": ended - generated,
            "timing_s/step": ended - began,
            "perf/throughput": metrics["perf/total_num_tokens"] / (ended - began),
        }

    def validate(self) -> dict[str, float]:
        """Probability that a sampled response to a held-out problem is right: verl's accuracy without its noise."""
        accuracy = supervision.sampled_accuracy(self.model, self._held_out.prompts, self._held_out.answers)
        return {self.setup.task.accuracy: accuracy}


def train(
    setup: Setup,
    model_folder: Path,
    digits: int,
    folder: Path,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Path:
    """Run `setup` to its end and return verl's JSON-lines log, beside which config.yaml is written.

    Args:
        setup: What to do.
        model_folder: The base model.
        digits: Digits of each number.
        folder: Folder of the run; what an earlier run left in it is replaced.
        on_step: Called with each trainer step and its metrics; None for silence.

    Raises:
        FolderInUse: Another process trains into `folder`.
    """
    with claim(folder):
        return _train(setup, model_folder, digits, folder, on_step)


def _train(
    setup: Setup, model_folder: Path, digits: int, folder: Path, on_step: Callable[[int, dict[str, float]], None] | None
) -> Path:
    OmegaConf.save(_as_run(setup, model_folder, digits), folder / "config.yaml", resolve=True)
    config, trainer = setup.config, setup.config.trainer
    # Where verl's loggers write; they read it from the environment only.
    os.environ |= {"VERL_FILE_LOGGER_PATH": str(folder / LOG), "TENSORBOARD_DIR": str(folder / "tensorboard")}
    # Its new events would lie beside those of the run before, as one curve.
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    backends = _backends(trainer.logger)
    logger = Tracking(trainer.project_name, trainer.experiment_name, backends, OmegaConf.to_container(config))
    bench = Bench(setup, model_folder, digits)
    if trainer.val_before_train:
        logger.log(bench.validate(), 0)
    for step in range(1, setup.steps + 1):
        metrics = bench.step(step)
        if step == setup.steps or (trainer.test_freq > 0 and step % trainer.test_freq == 0):
            metrics |= bench.validate()
        logger.log(metrics, step)
        if on_step:
            on_step(step, metrics)
    logger.finish()
    return folder / LOG


def _backends(loggers: str | Sequence[str]) -> list[str]:
    """verl's loggers of the run: its `file` logger in any case, and `console` never, in whose place is a progress bar.

    Args:
        loggers: `trainer.logger`; verl takes the name of a single one for a list of it.
    """
    named = [loggers] if isinstance(loggers, str) else loggers
    return ["file", *(name for name in named if name not in ("console", "file"))]


def _as_run(setup: Setup, model_folder: Path, digits: int) -> DictConfig:
    """The config with what the bench took in the place of files: its base model, and problems made in memory."""
    config = copy.deepcopy(setup.config)
    OmegaConf.update(config, "actor_rollout_ref.model.path", str(model_folder))
    for key in ("data.train_files", "data.val_files"):
        OmegaConf.update(config, key, f"{setup.task.data_source}, {digits} digits")
    return config


def versions() -> dict[str, str]:
    """What the numbers of a run may depend on beside its config."""
    import importlib.metadata

    names = ("verl-m2po", "verl", "torch", "transformers", "tensordict", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
