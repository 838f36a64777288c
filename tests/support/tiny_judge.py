"""A reward model that is made on the spot: the tiny model with a head that has a taste of its own."""

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def build(out: Path, base: Path, seed: int = 0) -> Path:
    """Write the model `base` with a drawn head of one score into the folder `out`, with its tokenizer.

    Args:
        out: folder, made where it is missing.
        base: a causal language model.
        seed: of the head.
    """
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    head = model.score.weight
    generator = torch.Generator().manual_seed(seed)
    head.data = torch.randn(head.shape, generator=generator) / head.shape[1] ** 0.5
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out
