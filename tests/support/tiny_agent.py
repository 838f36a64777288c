"""Products that a tiny model cannot calculate, a calculator that can, and a model that calls it now and then.

What the calculator answers has to be copied, with a full stop: a number alone would be a call. verl finds the reward by
``reward.custom_reward_function.path=<this file>``; the tool is that of `verl_m2po/tasks/calculator.py`.
"""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from verl_m2po.tasks.parquet import make_row, write
from verl_m2po.tasks.supervision import NO_TOKEN
from verl_m2po.tasks.tiny_model import END_OF_TURN, Recipe, make_model, make_tokenizer, one_deterministic_thread

DATA_SOURCE = "products"
LOWEST, HIGHEST = 11, 99
CALLING_SHARE = 0.35
"""Of the answers that the model is supervised with; in the others it guesses."""
STEPS, BATCH, LEARNING_RATE, WARM_UP_STEPS = 800, 64, 2e-3, 50


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """verl's reward function: 1.0 if the last turn is the right number and a full stop, else 0.0."""
    return float(solution_str.rsplit("assistant\n", 1)[-1].strip() == f"{ground_truth}.")


def _product(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(LOWEST, HIGHEST), rng.randint(LOWEST, HIGHEST)
    return f"{a}*{b}", str(a * b)


def write_parquet(folder: Path, train_rows: int = 512, validation_rows: int = 32) -> Path:
    """Write ``train.parquet`` and ``validation.parquet`` into `folder`, and return it."""
    for split, count in {"train": train_rows, "validation": validation_rows}.items():
        rng = random.Random(split)
        rows = []
        for index in range(count):
            expression, value = _product(rng)
            rows.append(
                make_row(
                    data_source=DATA_SOURCE,
                    content=f"{expression}=",
                    ability="math",
                    ground_truth=value,
                    split=split,
                    index=index,
                    question=f"{expression}=",
                    answer=value,
                )
            )
        write(rows, folder / f"{split}.parquet")
    return folder


def _example(tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> tuple[list[int], list[int]]:
    """A conversation's tokens, and the labels: only the model's own turns have some."""
    expression, value = _product(rng)
    opening = "<|im_start|>assistant\n"
    prompt = f"<|im_start|>user\n{expression}={END_OF_TURN}\n{opening}"
    if rng.random() < CALLING_SHARE:
        result = f"\n<|im_start|>tool\n{value}{END_OF_TURN}\n{opening}"
        turns = [
            (prompt, False),
            (f"{expression}{END_OF_TURN}", True),
            (result, False),
            (f"{value}.{END_OF_TURN}", True),
        ]
    else:
        guess = rng.randint(10 ** (len(value) - 1), 10 ** len(value) - 1)
        turns = [(prompt, False), (f"{guess}.{END_OF_TURN}", True)]
    ids, labels = [], []
    for text, is_its_own in turns:
        of_turn = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += of_turn
        labels += of_turn if is_its_own else [NO_TOKEN] * len(of_turn)
    return ids, labels


def _supervise(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> float:
    """Train `model` in place; returns the last loss, in nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.95))
    loss = torch.tensor(0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP_STEPS, (STEPS - step) / 200)
        examples = [_example(tokenizer, rng) for _ in range(BATCH)]
        longest = max(len(ids) for ids, _ in examples)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in examples])
        labels = torch.tensor([labels + [NO_TOKEN] * (longest - len(labels)) for _, labels in examples])
        # Padding is on the right, where no token that counts can see it.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NO_TOKEN)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


def build(out: Path, seed: int = 0) -> Path:
    """Write the model with its tokenizer into the folder `out`, and return it; about 20 s on one core."""
    recipe = Recipe(seed=seed)
    tokenizer = make_tokenizer(recipe.max_length)
    with one_deterministic_thread(seed):
        model = make_model(recipe, tokenizer)
        _supervise(model, tokenizer, random.Random(seed))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out
