"""The base models that come with the package: the same bits for everybody, and what their recipe makes."""

import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
from transformers import AutoModelForCausalLM

from verl_m2po.one_process import setup as setups
from verl_m2po.tasks import ship, supervision, tiny_model
from verl_m2po.tasks.made import TASKS
from verl_m2po.tasks.tiny_model import Recipe

RECIPES = pytest.mark.parametrize("recipe", ship.RECIPES, ids=lambda recipe: recipe.name)
# What the recipe promises on any machine: half of a step near the target, where it was full or a tenth
TOLERANCE, TOLERANCE_OF_SMALL_STEPS = 0.03, 0.01
# What the order of additions changes in a mean over 512 problems
ROUNDING = 1e-4


def tolerance(recipe: Recipe) -> float:
    return TOLERANCE if recipe.rate_near_target == 1 else TOLERANCE_OF_SMALL_STEPS


def shipped(recipe: Recipe) -> tuple[Path, dict]:
    weights = tiny_model.shipped(recipe)
    assert weights is not None, "python -m verl_m2po.tasks.ship"
    return weights, json.loads(weights.with_suffix(".json").read_text())


def test_the_commands_start_from_shipped_models():
    assert {Recipe(), *setups.RECIPES.values()} == set(ship.RECIPES)


@RECIPES
def test_building_takes_the_weights_bit_by_bit_without_supervision(recipe: Recipe, tmp_path: Path):
    weights, summary = shipped(recipe)
    steps: list[int] = []
    folder = tiny_model.build(recipe, cache=tmp_path, on_progress=lambda step, _: steps.append(step))
    built = safetensors.torch.load_file(folder / "model.safetensors")
    wanted = safetensors.torch.load_file(weights)
    assert steps == []
    assert built.keys() == wanted.keys()
    assert all(built[name].numpy().tobytes() == wanted[name].numpy().tobytes() for name in wanted)
    assert json.loads((folder / "recipe.json").read_text()) == summary


@RECIPES
def test_shipped_weights_are_the_recipes_in_shape_and_accuracy(recipe: Recipe, tmp_path: Path):
    weights, summary = shipped(recipe)
    tokenizer = tiny_model.make_tokenizer(recipe.max_length)
    untrained = tiny_model.make_model(recipe, tokenizer).state_dict()
    stored = safetensors.torch.load_file(weights)
    # The output layer is the embedding.
    assert untrained.keys() - stored.keys() == {"lm_head.weight"}
    assert {name: (t.shape, t.dtype) for name, t in stored.items()} == {
        name: (t.shape, t.dtype) for name, t in untrained.items() if name in stored
    }
    model = AutoModelForCausalLM.from_pretrained(tiny_model.build(recipe, cache=tmp_path))
    held_out = supervision.encode_problems(
        tokenizer,
        recipe.evaluation_problems,
        split="validation",
        digits=recipe.digits,
        seed=recipe.seed,
        task=TASKS[recipe.task],
    )
    accuracy = supervision.sampled_accuracy(model, *held_out)
    assert accuracy == pytest.approx(summary["sampled_accuracy"], abs=ROUNDING)
    assert accuracy == pytest.approx(recipe.target_accuracy, abs=tolerance(recipe))


def test_another_recipe_is_supervised():
    for change in ({"seed": 1}, {"target_accuracy": 0.31}, {"digits": 4}):
        assert tiny_model.shipped(dataclasses.replace(Recipe(), **change)) is None


@pytest.mark.slow
@pytest.mark.parametrize("recipe", (Recipe(), tiny_model.SMALL), ids=lambda recipe: recipe.name)
def test_the_recipe_lands_at_its_target_on_this_machine(recipe: Recipe):
    """Not that of the long responses: a step near its target is worth 0.06, and it takes minutes."""
    _, summary = tiny_model.supervised(recipe, tiny_model.make_tokenizer(recipe.max_length))
    assert summary["sampled_accuracy"] == pytest.approx(recipe.target_accuracy, abs=tolerance(recipe))
