"""Servers beside the rollout's: a reward model that scores what is generated, and a teacher whose opinion is learnt."""

from pathlib import Path

import pytest
import tiny_judge
from mode_runs import BATCH, LORA, SEPARATE, run_mode, spans_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900), pytest.mark.workload]

ON_CPU = {
    "tensor_model_parallel_size": "1",
    "free_cache_engine": "false",
    "+enable_sleep_mode": "false",
    "+engine_kwargs.vllm.distributed_executor_backend": "uni",
}


def server(key: str, **settings: str) -> list[str]:
    """Overrides for an inference server of verl's at `key`."""
    return [
        f"+{key}.{name[1:]}={value}" if name.startswith("+") else f"{key}.{name}={value}"
        for name, value in (ON_CPU | settings).items()
    ]


def judged_by(model: Path) -> list[str]:
    """Overrides for a reward model with a device of its own."""
    key = "reward.reward_model"
    lengths = {"prompt_length": "64", "response_length": "64"}
    return [
        # The rule of the task's own would come first.
        "reward.custom_reward_function.path=null",
        f"{key}.enable=true",
        f"{key}.enable_resource_pool=true",
        f"{key}.n_gpus_per_node=1",
        f"{key}.nnodes=1",
        f"{key}.model_path={model}",
        *server(f"{key}.rollout", name="vllm", dtype="float32", **lengths),
    ]


def taught_by(model: Path) -> list[str]:
    """Overrides for a teacher with a device of its own, beside the task's rewards."""
    key = "distillation"
    return [
        f"{key}.enabled=true",
        f"{key}.n_gpus_per_node=1",
        f"{key}.nnodes=1",
        f"{key}.teacher_models.teacher_model.model_path={model}",
        *server(f"{key}.teacher_models.teacher_model.inference"),
        f"{key}.distillation_loss.distillation_loss_coef=0.01",
    ]


@pytest.mark.feature("a reward model with devices of its own", mode="stale_k")
@pytest.mark.feature("a reward model with devices of its own", mode="bounded_async")
@pytest.mark.feature("a teacher, beside the task's rewards", mode="stale_k")
@pytest.mark.feature("a teacher, beside the task's rewards", mode="bounded_async")
@pytest.mark.feature("LoRA", mode="bounded_async")
@pytest.mark.feature("validation while training", mode="bounded_async")
@pytest.mark.parametrize("mode", ["stale_k", "bounded_async"])
def test_a_reward_model_and_a_teacher_judge_rollouts_that_are_trained_later(train, tmp_path, tiny, mode):
    """The teacher is the base model: as long as nothing is learnt, the two agree on every token."""
    # One update a trainer step.
    steps, age_updates = 8, 1
    result, ledger = run_mode(
        train,
        tmp_path,
        mode,
        age_updates,
        *judged_by(tiny_judge.build(tmp_path / "judge", tiny)),
        *taught_by(tiny),
        f"actor_rollout_ref.actor.ppo_mini_batch_size={BATCH}",
        *(() if mode == "stale_k" else (*SEPARATE, *LORA, "trainer.test_freq=4")),
        steps=steps,
    )
    assert max(result.series("staleness/age_updates_max")) == age_updates
    assert [line["step"] for line in ledger] == list(range(1, steps + 1)) and all(map(spans_of, ledger))
    # No rule scores 0 or 1 here: a model has a score of its own for each response.
    scores = [result.series(f"critic/score/{which}") for which in ("min", "mean", "max")]
    assert all(low < mean < high for low, mean, high in zip(*scores, strict=True))
    assert not {*scores[0], *scores[2]} & {0.0, 1.0}
    # Token by token what the teacher said is what the trainer finds, in float32, until the policy leaves the teacher's.
    disagreement = result.series("actor/distillation/abs_loss")
    assert len(disagreement) == steps
    assert disagreement[0] < 1e-6 < disagreement[-1]
