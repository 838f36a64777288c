"""A base model that is made on the spot: 0.3M parameters that do a task right about a third of the time.

The architecture is Qwen2's, so transformers, FSDP and vLLM treat it as they treat a real one. Supervision stops at a
measured accuracy rather than after a number of steps, so the model is about as good on any machine, and reinforcement
learning has something left to teach. The models of the recipes that the commands use come with the package (`shipped`):
they are the same bits everywhere.
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
from typing import Any

import safetensors.torch
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from verl_m2po.tasks import arithmetic, column_addition
from verl_m2po.tasks.made import TASKS
from verl_m2po.tasks.supervision import supervise
from verl_m2po.tasks.task import VALIDATION_ONE_IN

# Raise it whenever this file changes what a recipe builds: models cached by older releases are then left alone.
FORMAT = 2
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHIPPED = Path(__file__).parent / "models"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on; two equal recipes share one cached model.

    Args:
        task: What it learns, one of `TASKS`.
        seed: Seed of weights and batches, and of the problems.
        digits: Digits of the numbers of the task.
        target_accuracy: Supervision ends at the measurement nearest to this of the probability of sampling the right
            answer at temperature 1, averaged over held-out problems; between 0 and 1.
        max_steps: Optimizer steps after which supervision gives up.
        evaluate_every_steps: Optimizer steps between two measurements of accuracy; 1 near the target.
        evaluation_problems: Held-out problems that accuracy is measured on.
        training_problems: Problems that batches are drawn from, with replacement.
        batch_size: Problems in an optimizer step.
        learning_rate: AdamW's, after the warm-up.
        rate_near_target: Factor of `learning_rate` from half the target accuracy on; 1 leaves it as it is. Smaller
            steps land nearer to the target, and leave a base model from which reinforcement learning learns less.
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

    task: str = arithmetic.DATA_SOURCE
    seed: int = 0
    digits: int = arithmetic.TASK.digits
    target_accuracy: float = 0.3
    max_steps: int = 2000
    evaluate_every_steps: int = 10
    evaluation_problems: int = 512
    training_problems: int = 8192
    batch_size: int = 64
    learning_rate: float = 2e-3
    rate_near_target: float = 1.0
    warmup_steps: int = 50
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 2
    heads: int = 4
    key_value_heads: int = 2
    initializer_range: float = 0.05
    max_length: int = 4096

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is not one of {', '.join(TASKS)}")
        if not 0 < self.target_accuracy < 1:
            raise ValueError(f"target_accuracy={self.target_accuracy} is not between 0 and 1")
        if not 0 < self.rate_near_target <= 1:
            raise ValueError(f"rate_near_target={self.rate_near_target} is not above 0 and at most 1")
        for name in ("max_steps", "evaluate_every_steps", "evaluation_problems", "training_problems", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def name(self) -> str:
        """What it is called where files lie beside each other."""
        return f"{self.task}{self.digits}"


# 0.1M parameters. Heads of 32, the least that vLLM serves on the CPU: runs through verl can start from the same model.
SMALL = Recipe(
    digits=3,
    target_accuracy=0.343,
    rate_near_target=0.1,
    hidden_size=64,
    intermediate_size=128,
    heads=2,
    key_value_heads=1,
    max_steps=6000,
)
# As large, for responses of 60 to 120 tokens. One optimizer step near the target is worth 0.06: supervised elsewhere,
# it may end that far from it.
LONG = dataclasses.replace(SMALL, task=column_addition.DATA_SOURCE, digits=column_addition.TASK.digits)


def recipe_of(task: str, **changes: Any) -> Recipe:
    """The recipe of the model that runs through verl start from, with `changes`.

    Raises:
        ValueError: There is no such task, or a change is out of its range.
    """
    recipes = {recipe.task: recipe for recipe in (Recipe(), LONG)}
    return dataclasses.replace(recipes.get(task, LONG), task=task, **changes)


def build(
    recipe: Recipe | None = None,
    *,
    cache: Path | None = None,
    out: Path | None = None,
    on_progress: Callable[[int, float], None] | None = None,
) -> Path:
    """Return the folder of the model that `recipe` describes, supervising it first where no cache and no file has it.

    The folder loads with ``AutoModelForCausalLM`` and ``AutoTokenizer`` and is complete whenever it exists.

    Args:
        recipe: What to build; None builds the defaults. A recipe of `SHIPPED` gives the weights that come with the
            package, any other is supervised, about 15 s on one core at the size of the defaults.
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
        "validation_one_in": VALIDATION_ONE_IN,
    }
    digest = hashlib.blake2b(json.dumps(ingredients, sort_keys=True).encode(), digest_size=6).hexdigest()
    return f"tiny-qwen2-{recipe.name}-{digest}"


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


def shipped(recipe: Recipe) -> Path | None:
    """The weights of `recipe` that come with the package, the same bits on any machine; None if they are not there.

    ``python -m verl_m2po.tasks.ship`` made them, each with the recipe and the accuracy beside it.
    """
    described = SHIPPED / f"{recipe.name}.json"
    if not described.is_file() or not _is_of(json.loads(described.read_text()), recipe):
        return None
    return described.with_suffix(".safetensors")


def _is_of(summary: dict[str, Any], recipe: Recipe) -> bool:
    return {**summary, "format": FORMAT, **dataclasses.asdict(recipe)} == summary


def _make(recipe: Recipe, folder: Path, on_progress: Callable[[int, float], None] | None) -> None:
    tokenizer = make_tokenizer(recipe.max_length)
    if weights := shipped(recipe):
        model = make_model(recipe, tokenizer)
        # Strict except for the output layer, which is tied to the embedding and stored once.
        safetensors.torch.load_model(model, weights)
        summary = json.loads(weights.with_suffix(".json").read_text())
    else:
        model, summary = supervised(recipe, tokenizer, on_progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(summary, indent=2) + "\n")


def supervised(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, on_progress: Callable[[int, float], None] | None = None
) -> tuple[Qwen2ForCausalLM, dict[str, Any]]:
    """The model that `recipe` makes on this machine, and what ``recipe.json`` says of it."""
    with one_deterministic_thread(recipe.seed):
        model = make_model(recipe, tokenizer)
        accuracy = supervise(model, tokenizer, recipe, on_progress)
    return model, {"format": FORMAT, "sampled_accuracy": accuracy, **dataclasses.asdict(recipe)}


@contextmanager
def one_deterministic_thread(seed: int) -> Iterator[None]:
    """Compute on one thread, from `seed`, and leave torch's own as it was."""
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
