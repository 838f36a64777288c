"""The trainer mode `replay` on real Ray, TransferQueue, FSDP and vLLM: each rollout is trained twice, in its window."""

import pytest

pytestmark = pytest.mark.e2e


def test_half_of_each_batch_is_generated_and_the_rest_was_trained_before(train):
    """Two updates a step and a window of four: a rollout may be trained again for two more steps."""
    run = train(
        *("loss=m2po", "staleness=replay", "replay=x2"),
        *("trainer.v1.replay.staleness_updates=4", "trainer.total_training_steps=5", "trainer.save_freq=-1"),
    )
    assert run.series("staleness/replayed") == [0, 4, 4, 4, 4]
    # The first batch is new as a whole, and each step but the last starts the new half of the next one.
    assert run.series("staleness/admitted") == [12, 4, 4, 4, 0]
    assert run.series("staleness/age_updates_max")[0] == 0
    assert 0 < max(run.series("staleness/age_updates_max")) <= 4
