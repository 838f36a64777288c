"""Supervision of a base model on a task of ours, up to a measured accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from verl_m2po.tasks import arithmetic
from verl_m2po.tasks.made import TASKS
from verl_m2po.tasks.task import Task

if TYPE_CHECKING:
    from verl_m2po.tasks.tiny_model import Recipe

# Label of a position that carries no loss; torch's own convention.
NO_TOKEN = -100
# Share of the target accuracy from which on it is measured after every step: ten may then be worth 0.15.
NEAR = 0.5


def encode_problems(
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    split: str,
    digits: int,
    seed: int,
    task: Task = arithmetic.TASK,
) -> tuple[Tensor, Tensor]:
    """Problems 0 to `count` - 1 of a task as token ids.

    Returns:
        prompts: int64 [count, prompt], all of one length.
        answers: int64 [count, longest answer + 1]: the right response and the end of the turn, then `NO_TOKEN`.
    """
    problems = (task.problem(index, split=split, digits=digits, seed=seed) for index in range(count))
    questions, right = zip(*problems, strict=True)
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportArgumentType]
    answers = torch.full((count, task.longest_answer(digits) + 1), NO_TOKEN)
    for row, ids in zip(
        answers, tokenizer([f"{answer}{tokenizer.eos_token}" for answer in right])["input_ids"], strict=True
    ):
        row[: len(ids)] = torch.tensor(ids)
    return torch.tensor(prompts), answers


def answer_log_probs(model: Qwen2ForCausalLM, prompts: Tensor, answers: Tensor) -> Tensor:
    """Log-probability of each answer token at temperature 1, 0 where there is none; float32 [count, answer]."""
    is_token = answers != NO_TOKEN
    targets = answers.masked_fill(~is_token, 0)
    logits = model(input_ids=torch.cat([prompts, targets], dim=1), use_cache=False).logits
    predictions = logits[:, prompts.shape[1] - 1 : -1].log_softmax(-1)
    return predictions.gather(-1, targets[..., None]).squeeze(-1) * is_token


@torch.no_grad()
def sampled_accuracy(model: Qwen2ForCausalLM, prompts: Tensor, answers: Tensor) -> float:
    """Probability that a response sampled at temperature 1 earns the reward, averaged over problems; exact, not a draw.

    Just one sequence of tokens is right, so its probability is the accuracy (white space around it aside).
    """
    return answer_log_probs(model, prompts, answers).sum(dim=1).exp().mean().item()


def supervise(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    on_progress: Callable[[int, float], None] | None = None,
) -> float:
    """Train `model` in place to the measured accuracy nearest to the target, and return that accuracy.

    Args:
        model: Untrained.
        tokenizer: Of the model.
        recipe: Problems, optimizer, target and when to give up.
        on_progress: Called with the optimizer step and the accuracy at every measurement; None for silence.

    Raises:
        RuntimeError: The target accuracy was not reached within the recipe's steps.
    """
    held_out = _encode(tokenizer, recipe, "validation", recipe.evaluation_problems)
    data = _encode(tokenizer, recipe, "train", recipe.training_problems)
    target, best, weights = recipe.target_accuracy, 0.0, {}

    def pace() -> float:
        return recipe.rate_near_target if best >= NEAR * target else 1.0

    for step in _steps(model, data, recipe, pace):
        if step % recipe.evaluate_every_steps and best < NEAR * target:
            continue
        accuracy = sampled_accuracy(model, *held_out)
        if on_progress:
            on_progress(step, accuracy)
        if accuracy < target and accuracy > best:
            best, weights = accuracy, {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if accuracy >= target:
            if not weights or accuracy - target <= target - best:
                return accuracy
            model.load_state_dict(weights)
            return best
    raise RuntimeError(
        f"supervision stopped after max_steps={recipe.max_steps} at an accuracy of {best:.3f}, below "
        f"target_accuracy={target}: raise max_steps, or lower target_accuracy or digits={recipe.digits}"
    )


def _encode(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, split: str, count: int) -> tuple[Tensor, Tensor]:
    task = TASKS[recipe.task]
    return encode_problems(tokenizer, count, split=split, digits=recipe.digits, seed=recipe.seed, task=task)


def _steps(
    model: Qwen2ForCausalLM, data: tuple[Tensor, Tensor], recipe: Recipe, pace: Callable[[], float]
) -> Iterator[int]:
    """Make the recipe's optimizer steps, and yield the number of each, from 1, after it.

    Args:
        model: Trained in place.
        data: Prompts and answers to draw from, as `encode_problems` gives them.
        recipe: Number of steps, batch and optimizer.
        pace: Factor of the learning rate, asked after each step.
    """
    prompts, answers = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: pace() * min(1.0, (step + 1) / (recipe.warmup_steps + 1))
    )
    for step in range(1, recipe.max_steps + 1):
        batch = torch.randint(len(prompts), (recipe.batch_size,))
        log_probs = answer_log_probs(model, prompts[batch], answers[batch])
        loss = -log_probs.sum() / (answers[batch] != NO_TOKEN).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step
        schedule.step()
