"""Makes the base models that come with the package: ``python -m verl_m2po.tasks.ship``, after a change of a recipe.

What it writes differs from machine to machine, by the order in which kernels add; that is why the result is committed.
"""

import json
import logging

import safetensors.torch

from verl_m2po.tasks import tiny_model

logger = logging.getLogger(__name__)
# Of the quickstart and the recipes through verl, and of the two tasks of the experiment bench and the study
RECIPES = (tiny_model.Recipe(), tiny_model.SMALL, tiny_model.LONG)


def ship(recipe: tiny_model.Recipe) -> None:
    """Supervise `recipe` and write its weights, and beside them what they are, into `tiny_model.SHIPPED`."""
    model, summary = tiny_model.supervised(recipe, tiny_model.make_tokenizer(recipe.max_length))
    tiny_model.SHIPPED.mkdir(exist_ok=True)
    weights = tiny_model.SHIPPED / f"{recipe.name}.safetensors"
    # The output layer is the embedding; transformers stores it once, under this name.
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    weights.with_suffix(".json").write_text(json.dumps(summary, indent=2) + "\n")
    logger.info("%s: accuracy %.4f", weights, summary["sampled_accuracy"])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for recipe in RECIPES:
        ship(recipe)
