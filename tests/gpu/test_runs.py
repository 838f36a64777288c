"""Four trainer steps on GPUs: exact staleness, the bound, LoRA, and weights that reach the servers."""

import cpu_run
import pytest

from verl_m2po.staleness.account.ledger import read_ledger

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

STEPS = 4
# Mean of (log r)^2 of tokens that the very weights generated that look at them: the two engines in bfloat16.
MISMATCH = 1e-2
SEPARATE = (
    "actor_rollout_ref.hybrid_engine=false",
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=1",
)


@pytest.mark.parametrize(
    ("mode", "overrides"),
    [
        ("stale_k", ()),
        ("stale_k", ("actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora.merge=true")),
        ("bounded_async", SEPARATE),
    ],
    ids=["stale_k", "stale_k, LoRA", "bounded_async"],
)
def test_four_steps(two_gpus, tmp_path, tiny, addition, measured, mode, overrides):
    ledger = tmp_path / "ledger.jsonl"
    result = cpu_run.run_main(
        tmp_path,
        f"actor_rollout_ref.model.path={tiny}",
        f"data.train_files={addition / 'train.parquet'}",
        f"data.val_files={addition / 'validation.parquet'}",
        "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.rollout.n=4",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        f"trainer.total_training_steps={STEPS}",
        f"trainer.v1.trainer_mode={mode}",
        f"trainer.v1.{mode}.staleness_updates=2",
        f"trainer.v1.{mode}.ledger_path={ledger}",
        *overrides,
        hardware="one_gpu",
        timeout_s=220,
    )
    assert result.status == 0, result.tail
    ages = result.series("staleness/age_updates_max")
    assert len(ages) == STEPS and max(ages) <= 2
    if mode == "stale_k":
        assert ages == [0, 2, 2, 2]
    assert len(read_ledger(ledger)) == STEPS
    # Rows of age zero: the weights that trained are the weights that were served.
    assert max(result.series("actor/m2po/mismatch_floor")) < MISMATCH
    measured.append(
        f"{mode} {' '.join(overrides)}: {STEPS} steps, mismatch {result.series('actor/m2po/mismatch_floor')}"
    )
