"""The trainer mode `replay` on real Ray, TransferQueue, FSDP and vLLM: successes are trained again, in their window."""

import pytest

pytestmark = pytest.mark.e2e

BATCH, STEPS = 8, 5


def test_part_of_each_batch_is_generated_and_the_rest_are_earlier_successes(train):
    """Two updates a step and a window of four: a rollout may be trained again for two more steps."""
    run = train(
        *("loss=m2po", "staleness=replay", "replay=self_imitation", "trainer.v1.replay.staleness_updates=4"),
        *(f"trainer.total_training_steps={STEPS}", "trainer.save_freq=-1"),
    )
    replayed, admitted = run.series("staleness/replayed"), run.series("staleness/admitted")
    # The first batch is new as a whole; later ones as far as there are too few successes.
    assert replayed[0] == 0 and 0 < max(replayed) <= BATCH / 2
    assert sum(admitted) == sum(BATCH - again for again in replayed)
    assert run.series("staleness/age_updates_max")[0] == 0
    assert 0 < max(run.series("staleness/age_updates_max")) <= 4
