"""Each recipe: its folder, its config and its commands belong together, and scale down by overrides only."""

import re
import subprocess
from pathlib import Path

import pytest
import recipe_runs
from composing import composed, primaries

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]

DOCUMENTED = {
    # What a README's command for the CPU may change: where it runs, how much, how long.
    "task",
    "model",
    "hardware",
    "loss",
    "staleness",
    "data.train_batch_size",
    "actor_rollout_ref.actor.ppo_mini_batch_size",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "actor_rollout_ref.rollout.n",
    "trainer.total_training_steps",
    "trainer.v1.stale_k.staleness_updates",
    "trainer.test_freq",
    "trainer.val_before_train",
    "trainer.save_freq",
    "trainer.resume_mode",
}


def arguments(recipe: str) -> tuple[str, list[str]]:
    """Config name and overrides of the README's command."""
    command = recipe_runs.cpu_command(recipe)[3:]
    (config,) = (part.removeprefix("--config-name=") for part in command if part.startswith("--config-name="))
    return config, [part for part in command if not part.startswith("--")]


@pytest.mark.parametrize("recipe", recipe_runs.names())
def test_the_command_for_the_cpu_composes_two_steps(recipe):
    config_name, overrides = arguments(recipe)
    assert config_name in primaries()
    first_of_a_sweep = [override.partition(",")[0] for override in overrides]
    config = composed(config_name, *first_of_a_sweep)
    assert (config.trainer.device, config.trainer.total_training_steps) == ("cpu", 2)


@pytest.mark.parametrize("recipe", recipe_runs.names())
def test_the_command_for_the_cpu_changes_size_and_place_only(recipe):
    _, overrides = arguments(recipe)
    assert {override.partition("=")[0] for override in overrides} <= DOCUMENTED


@pytest.mark.parametrize("recipe", recipe_runs.names())
def test_the_script_is_a_shell_script_that_ends_in_the_users_overrides(recipe):
    (script,) = (recipe_runs.RECIPES / recipe).glob("run_*.sh")
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.read_text().rstrip().endswith('"$@"')


DOCUMENTS = [
    *(REPOSITORY / "docs").glob("*.md"),
    *(REPOSITORY / "recipes").rglob("*.md"),
    *(REPOSITORY / "recipes").rglob("*.sh"),
    *(REPOSITORY / "verl_m2po" / "config").glob("*.yaml"),
    REPOSITORY / "README.md",
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_command_has_a_flag_between_overrides(document):
    """Hydra's parser refuses ``a=1 -m b=2``: flags stand before all overrides, or after all of them."""
    text = re.sub(r"\\\n#?", " ", document.read_text())
    for command in re.findall(r"verl\.trainer\.main_ppo +(-[^\n`]*)", text):
        kinds = "".join("f" if part.startswith("-") else "o" for part in command.split())
        assert re.fullmatch("f*o*f*", kinds), command
