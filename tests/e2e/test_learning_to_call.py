"""An agent learns from stale rollouts to use its tool: on a task that the model cannot do without it."""

from pathlib import Path

import pytest
import tiny_agent
from mode_runs import SEPARATE, UPDATES_PER_STEP, run_mode, trained_tokens, with_tool

from verl_m2po.tasks import calculator

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900), pytest.mark.workload]


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and under `model` a model that calls the calculator at a quarter of the products."""
    folder = tiny_agent.write_parquet(tmp_path_factory.mktemp("products"))
    tiny_agent.build(folder / "model")
    return folder


@pytest.mark.feature("an agent with a tool, several turns", mode="stale_k")
@pytest.mark.feature("an agent with a tool, several turns", mode="bounded_async")
@pytest.mark.parametrize("mode", ["stale_k", "bounded_async"])
def test_to_call_the_calculator_is_learnt_from_rollouts_of_older_weights(train, tmp_path, products, mode):
    """Right answers are calls: it must have called wherever it scores, and in the end it nearly always does."""
    steps = 32
    result, ledger = run_mode(
        train,
        tmp_path,
        mode,
        UPDATES_PER_STEP,
        *(() if mode == "stale_k" else SEPARATE),
        f"actor_rollout_ref.model.path={products / 'model'}",
        f"data.train_files={products / 'train.parquet'}",
        f"data.val_files={products / 'validation.parquet'}",
        *with_tool(calculator.__file__, tiny_agent.__file__, turns=2),
        "actor_rollout_ref.actor.optim.lr=3e-4",
        steps=steps,
    )
    assert max(result.series("staleness/age_updates_max")) == UPDATES_PER_STEP
    assert result.series("staleness/trained_tokens") == trained_tokens(ledger, steps)
    scores, turns = result.series("critic/score/mean"), result.series("num_turns/mean")
    # A question and an answer, or a question, a call, its result and an answer.
    for score, turn in zip(scores, turns, strict=True):
        assert score <= (turn - 2) / 2 + 1e-6
    assert sum(scores[:3]) / 3 < 0.5, "the base model calls too often for anything to be learnt"
    assert sum(scores[-3:]) / 3 > 0.8
