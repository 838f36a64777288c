"""The exact accuracy of each checkpoint of a run through verl: no noise of sampling, and no time of the run's."""

import json
import re
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from verl_m2po.one_process.rollouts import Problems
from verl_m2po.one_process.train import VALIDATION_PROBLEMS
from verl_m2po.tasks import arithmetic, supervision

ACCURACIES = "accuracies.json"
"""In the folder of a run: {trainer step: probability of a right response to a problem that the bench holds out}."""

WITH_MODEL = "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]"
"""Of a run whose checkpoints can be measured."""


def measure(run: Path, base_model: Path, digits: int) -> None:
    """Write `ACCURACIES` of the run in the folder `run`: of its base model, as step 0, and of all its checkpoints."""
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    held_out = Problems.make(tokenizer, arithmetic.TASK, VALIDATION_PROBLEMS, "validation", digits)

    def accuracy(folder: Path) -> float:
        model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return supervision.sampled_accuracy(model, held_out.prompts, held_out.answers)

    found = {step: accuracy(folder) for step, folder in sorted({0: base_model, **_models(run)}.items())}
    (run / ACCURACIES).write_text(json.dumps(found, indent=1) + "\n")


def _models(run: Path) -> dict[int, Path]:
    folders = run.glob("checkpoints/global_step_*/actor/huggingface")
    return {int(match[1]): folder for folder in folders if (match := re.search(r"global_step_(\d+)", str(folder)))}


def read(run: Path) -> dict[int, float]:
    """By trainer step; empty where nothing was measured."""
    path = run / ACCURACIES
    return {int(step): value for step, value in json.loads(path.read_text()).items()} if path.exists() else {}
