"""A vision-language model that is made on the spot: 0.3M parameters that name a colour right about half of the time.

The architecture is Qwen2-VL's, with its processor, so transformers, FSDP and vLLM treat it as they treat a real one.
"""

import dataclasses
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pictures
import torch
from transformers import (
    BatchFeature,
    GenerationConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from verl_m2po.tasks.supervision import NO_TOKEN
from verl_m2po.tasks.tiny_model import END_OF_TURN, PADDING, make_tokenizer, one_deterministic_thread

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on.

    Args:
        seed: Seed of weights, batches and wrong answers.
        right_share: Share of right answers among those that it is supervised with; between 0 and 1. The others are any
            colour, so that it names the right one about that often, and reinforcement learning has the rest to teach.
        steps: Optimizer steps.
        batch_size: Pictures in a step; a quarter of them videos.
        learning_rate: AdamW's.
        hidden_size: Width of the residual stream and of the vision tower. Two heads of 32, the least vLLM serves on
            CPU.
        patch_pixels: Side of a patch; a token is two by two of them.
        max_length: Longest prompt and response together, in tokens.
    """

    seed: int = 0
    right_share: float = 0.4
    steps: int = 120
    batch_size: int = 32
    learning_rate: float = 4e-3
    hidden_size: int = 64
    patch_pixels: int = 16
    max_length: int = 512


def make_processor(recipe: Recipe) -> Qwen2VLProcessor:
    """Qwen2-VL's processor around the tiny model's tokenizer, for pictures of the size that they are drawn in."""
    tokenizer = make_tokenizer(recipe.max_length)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *VISION_TOKENS]})
    tokenizer.chat_template = CHAT_TEMPLATE
    pixels = pictures.SIZE_PIXELS**2
    sizes = {"patch_size": recipe.patch_pixels, "size": {"shortest_edge": pixels, "longest_edge": pixels}}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=CHAT_TEMPLATE,
    )


def make_model(recipe: Recipe, processor: Qwen2VLProcessor) -> Qwen2VLForConditionalGeneration:
    """The untrained model, float32, with as many rows in the vocabulary as the tokenizer has tokens."""
    vocabulary = processor.tokenizer.get_vocab()
    size = recipe.hidden_size
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": size,
            "intermediate_size": 2 * size,
            "num_hidden_layers": 2,
            "num_attention_heads": size // 32,
            "num_key_value_heads": 1,
            "max_position_embeddings": recipe.max_length,
            "initializer_range": 0.05,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": vocabulary[END_OF_TURN],
            "pad_token_id": vocabulary[PADDING],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 1,
            "embed_dim": size,
            "hidden_size": size,
            "mlp_ratio": 2,
            "num_heads": size // 32,
            "patch_size": recipe.patch_pixels,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": 0.05,
        },
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="float32",
    )
    model = Qwen2VLForConditionalGeneration(config).float()
    model.generation_config = GenerationConfig(
        eos_token_id=vocabulary[END_OF_TURN], pad_token_id=vocabulary[PADDING], do_sample=True
    )
    return model


def _encode(
    processor: Qwen2VLProcessor, drawings: Sequence[pictures.Drawing], colours: Sequence[str]
) -> tuple[BatchFeature, torch.Tensor]:
    """Drawings of one kind with their answers as model inputs, and the labels: no token of a prompt has one."""
    kind = "video" if drawings[0].is_video else "image"
    message = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": pictures.QUESTION}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    frames = [list(drawing.frames) for drawing in drawings]
    seen = {"videos": [np.stack(of_one) for of_one in frames]} if kind == "video" else {"images": frames}
    inputs = processor(
        text=[f"{prompt}{colour}{END_OF_TURN}" for colour in colours],
        **seen,
        padding=True,
        return_tensors="pt",
        do_sample_frames=False,
    )
    prompt_tokens = int(inputs["attention_mask"][0].sum()) - len(colours[0]) - 1
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, NO_TOKEN)
    labels[:, :prompt_tokens] = NO_TOKEN
    return inputs, labels


def _log_probs(model: Qwen2VLForConditionalGeneration, inputs: BatchFeature, labels: torch.Tensor) -> torch.Tensor:
    """Log-probability of each answer; float32 [drawings]."""
    predicted = model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    gathered = predicted.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return (gathered * (targets != NO_TOKEN)).sum(1)


def supervise(model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, recipe: Recipe) -> None:
    """Train `model` in place on answers of which a share is right."""
    rng = random.Random(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01, betas=(0.9, 0.95))
    kinds = _drawings(recipe, recipe.batch_size * recipe.steps // 2, "train")
    for step in range(recipe.steps):
        batch = rng.sample(kinds[step % pictures.VIDEO_ONE_IN == 0], recipe.batch_size)
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * min(1, (step + 1) / 20, (recipe.steps - step) / 40)
        told = [
            each.colour if rng.random() < recipe.right_share else rng.choice(list(pictures.COLOURS)) for each in batch
        ]
        loss = -_log_probs(model, *_encode(processor, batch, told)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def sampled_accuracy(
    model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, recipe: Recipe, count: int = 128
) -> float:
    """Probability that an answer sampled at temperature 1 is right, averaged over held-out drawings of both kinds."""
    scores = [
        _log_probs(model, *_encode(processor, [each], [each.colour])).exp()
        for of_kind in _drawings(recipe, count, "validation").values()
        for each in of_kind
    ]
    return torch.cat(scores).mean().item()


def _drawings(recipe: Recipe, count: int, split: str) -> dict[bool, list[pictures.Drawing]]:
    """The first `count` rows of the task, by whether they are videos."""
    found: dict[bool, list[pictures.Drawing]] = {True: [], False: []}
    for index in range(count):
        drawing = pictures.drawing(index, split=split, seed=recipe.seed)
        found[drawing.is_video].append(drawing)
    return found


def build(out: Path, recipe: Recipe | None = None) -> Path:
    """Write the model that `recipe` describes, with its processor, into the folder `out`; about 10 s on one core.

    Args:
        out: Folder, made where it is missing.
        recipe: What to build; None builds the defaults.
    """
    recipe = recipe or Recipe()
    processor = make_processor(recipe)
    with one_deterministic_thread(recipe.seed):
        model = make_model(recipe, processor)
        supervise(model, processor, recipe)
        accuracy = sampled_accuracy(model, processor, recipe)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    summary = {"sampled_accuracy": accuracy, **dataclasses.asdict(recipe)}
    (Path(out) / "recipe.json").write_text(json.dumps(summary, indent=2) + "\n")
    return Path(out)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
    pictures.write_parquet(Path(sys.argv[1]) / "data", train_rows=96)
