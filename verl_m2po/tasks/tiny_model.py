"""A base model that is made on the spot: 0.3M parameters that add two numbers right about a third of the time.

The architecture is Qwen2's, so transformers, FSDP and vLLM treat it as they treat a real one. Supervision stops at a
measured accuracy rather than after a number of steps, so the model is about as good on any machine, and reinforcement
learning has something left to teach.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from verl_m2po.tasks import arithmetic

# Raise it whenever this file changes what a recipe builds: models cached by older releases are then left alone.
FORMAT = 1
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
# Label of a position that carries no loss; torch's own convention.
NO_TOKEN = -100


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on; two equal recipes share one cached model.

    Args:
        seed: Seed of weights and batches, and of the problems.
        digits: Digits of each number that is added.
        target_accuracy: Supervision stops as soon as the probability of sampling the right answer at temperature 1,
            averaged over held-out problems, has reached this; between 0 and 1.
        max_steps: Optimizer steps after which supervision gives up.
        evaluate_every_steps: Optimizer steps between two measurements of accuracy.
        evaluation_problems: Held-out problems that accuracy is measured on.
        training_problems: Problems that batches are drawn from, with replacement.
        batch_size: Problems in an optimizer step.
        learning_rate: AdamW's, after the warm-up.
        warmup_steps: Optimizer steps over which the learning rate rises from 0.
        hidden_size: Width of the residual stream. With 4 heads, 128 gives heads of 32, the least vLLM serves on CPU.
        intermediate_size: Width of the gated feed-forward layer.
        layers: Transformer layers.
        heads: Attention heads.
        key_value_heads: Heads that keys and values are shared between; divides `heads`.
        initializer_range: Standard deviation of the initial weights. transformers' 0.02 is made for wide models: at
            this width it doubles the steps until addition is learnt.
        max_length: Longest prompt and response together, in tokens (bytes, for anything but role names).
    """

    seed: int = 0
    digits: int = 2
    target_accuracy: float = 0.3
    max_steps: int = 2000
    evaluate_every_steps: int = 10
    evaluation_problems: int = 512
    training_problems: int = 8192
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 2
    heads: int = 4
    key_value_heads: int = 2
    initializer_range: float = 0.05
    max_length: int = 4096

    def __post_init__(self) -> None:
        if not 0 < self.target_accuracy < 1:
            raise ValueError(f"target_accuracy={self.target_accuracy} is not between 0 and 1")
        for name in ("max_steps", "evaluate_every_steps", "evaluation_problems", "training_problems", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def build(
    recipe: Recipe | None = None,
    *,
    cache: Path | None = None,
    out: Path | None = None,
    on_progress: Callable[[int, float], None] | None = None,
) -> Path:
    """Return the folder of the model that `recipe` describes, supervising it first if no cache holds it.

    The folder loads with ``AutoModelForCausalLM`` and ``AutoTokenizer`` and is complete whenever it exists.

    Args:
        recipe: What to build; None builds the defaults, about 15 s on one core.
        cache: Where models are kept between runs; None is `default_cache`.
        out: A folder that receives a copy, and is then the one returned; None returns the one in the cache.
        on_progress: Called with the optimizer step and the accuracy at every measurement; None for silence.

    Raises:
        OSError: A folder cannot be written to.
        RuntimeError: The target accuracy was not reached within the recipe's steps.
    """
    recipe = recipe or Recipe()
    cached = (Path(cache) if cache else default_cache()).expanduser().absolute() / folder_name(recipe)
    if not _is_complete(cached):
        # Two processes that build the same model at once both succeed: the second finds the first one's and keeps it.
        _write_beside_and_rename(cached, lambda folder: _make(recipe, folder, on_progress), keep=_is_complete)
    if out is None:
        return cached
    copy = Path(out).expanduser().absolute()
    _write_beside_and_rename(copy, lambda folder: shutil.copytree(cached, folder, dirs_exist_ok=True))
    return copy


def default_cache() -> Path:
    """``verl-m2po`` under ``$XDG_CACHE_HOME``, or under ``~/.cache`` where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "verl-m2po"


def folder_name(recipe: Recipe) -> str:
    """Name of the cached model: a hash of all that it is made from."""
    ingredients = {
        "format": FORMAT,
        "recipe": dataclasses.asdict(recipe),
        "chat_template": CHAT_TEMPLATE,
        "validation_one_in": arithmetic.VALIDATION_ONE_IN,
    }
    digest = hashlib.blake2b(json.dumps(ingredients, sort_keys=True).encode(), digest_size=6).hexdigest()
    return f"tiny-qwen2-add{recipe.digits}-{digest}"


def make_tokenizer(max_length: int = Recipe.max_length) -> Qwen2Tokenizer:
    """Qwen2's tokenizer without merges: one token a byte, so it reads any text, and one for each role.

    ``AutoTokenizer`` rebuilds exactly this class for ``model_type: qwen2``. Of the chat markers verl needs
    ``<|im_end|>``, and a line break that is one token.
    """
    bytes_first = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=bytes_first,
        merges=[],
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        additional_special_tokens=["<|im_start|>"],
        model_max_length=max_length,
    )
    tokenizer.add_tokens(["system", "user", "assistant"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """The untrained model, float32, with as many rows in the vocabulary as `tokenizer` has tokens.

    vLLM gives rows beyond the tokenizer's no probability, and its log-probs would differ from the trainer's.
    """
    vocabulary = tokenizer.get_vocab()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=recipe.max_length,
        initializer_range=recipe.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary[END_OF_TURN],
        pad_token_id=vocabulary[PADDING],
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config).float()
    model.generation_config = GenerationConfig(
        eos_token_id=vocabulary[END_OF_TURN], pad_token_id=vocabulary[PADDING], do_sample=True
    )
    return model


def encode_problems(
    tokenizer: PreTrainedTokenizerBase, count: int, *, split: str, digits: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Problems 0 to `count` - 1 of the arithmetic task as token ids.

    Returns:
        prompts: int64 [count, prompt], all of one length because every number has the same number of digits.
        answers: int64 [count, digits + 2]: the digits of the sum and the end of the turn, then `NO_TOKEN`.
    """
    problems = (arithmetic.problem(index, split=split, digits=digits, seed=seed) for index in range(count))
    questions, sums = zip(*(arithmetic.question_and_answer(a, b) for a, b in problems), strict=True)
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportArgumentType]
    answers = torch.full((count, digits + 2), NO_TOKEN)
    for row, ids in zip(answers, tokenizer([answer + END_OF_TURN for answer in sums])["input_ids"], strict=True):
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


def _make(recipe: Recipe, folder: Path, on_progress: Callable[[int, float], None] | None) -> None:
    with _one_deterministic_thread(recipe.seed):
        tokenizer = make_tokenizer(recipe.max_length)
        model = make_model(recipe, tokenizer)
        accuracy = _supervise(model, tokenizer, recipe, on_progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    summary = {"format": FORMAT, "sampled_accuracy": accuracy, **dataclasses.asdict(recipe)}
    (folder / "recipe.json").write_text(json.dumps(summary, indent=2) + "\n")


def _supervise(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    on_progress: Callable[[int, float], None] | None,
) -> float:
    def encode(split: str, count: int) -> tuple[Tensor, Tensor]:
        return encode_problems(tokenizer, count, split=split, digits=recipe.digits, seed=recipe.seed)

    prompts, answers = encode("train", recipe.training_problems)
    held_out = encode("validation", recipe.evaluation_problems)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01, betas=(0.9, 0.95))
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (recipe.warmup_steps + 1)))
    accuracy = 0.0
    for step in range(1, recipe.max_steps + 1):
        batch = torch.randint(len(prompts), (recipe.batch_size,))
        log_probs = answer_log_probs(model, prompts[batch], answers[batch])
        loss = -log_probs.sum() / (answers[batch] != NO_TOKEN).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        if step % recipe.evaluate_every_steps == 0:
            accuracy = sampled_accuracy(model, *held_out)
            if on_progress:
                on_progress(step, accuracy)
            if accuracy >= recipe.target_accuracy:
                return accuracy
    raise RuntimeError(
        f"supervision stopped after max_steps={recipe.max_steps} at an accuracy of {accuracy:.3f}, below "
        f"target_accuracy={recipe.target_accuracy}: raise max_steps, or lower target_accuracy or digits={recipe.digits}"
    )


@contextmanager
def _one_deterministic_thread(seed: int) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (*FILES, "recipe.json"))


def _write_beside_and_rename(
    folder: Path, fill: Callable[[Path], object], keep: Callable[[Path], bool] = lambda _: False
) -> None:
    """Let `fill` write a folder beside `folder` and give it that name once it is complete.

    What is already there is replaced, unless `keep` says at that moment that it should stay.
    """
    if folder.exists() and not (folder / "recipe.json").is_file() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not a model made by this package: choose another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OSError(f"cannot write to {folder.parent}: {error.strerror}. Choose another folder.") from error
    try:
        fill(part)
        part.chmod(0o755)
        if not keep(folder):
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
