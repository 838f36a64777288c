"""Every recipe takes two real steps on the CPU, by the command of its README: real Ray, TransferQueue, FSDP and vLLM.

`make recipes` runs them all. `make test` runs one of them, from the installed wheel: tests/plugin/test_wheel.py.
"""

import os
import sys
from pathlib import Path

import pytest
import recipe_runs

from verl_m2po.tasks import prepare

pytestmark = [pytest.mark.e2e, pytest.mark.recipe, pytest.mark.timeout(600)]

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny, addition) -> Path:
    """A home with model and data where the recipes look for them."""
    home = tmp_path_factory.mktemp("home")
    recipe_runs.furnish(home, tiny, addition)
    if GSM8K.is_dir():
        prepare.prepare("gsm8k", home / "data" / "gsm8k", source=GSM8K)
    return home


@pytest.mark.parametrize("recipe", recipe_runs.names())
def test_two_steps(recipe, tmp_path, home):
    if recipe.startswith("gsm8k") and not (home / "data" / "gsm8k").is_dir():
        pytest.skip(f"needs GSM8K in {GSM8K}")
    environment = {**os.environ, "HOME": str(home)}
    recipe_runs.check(recipe_runs.run(recipe, tmp_path, Path(sys.executable), environment))
