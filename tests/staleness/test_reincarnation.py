"""The reference becomes the actor on verl's real FSDP2 engine, over one rank and two."""

import pytest
from actor_worker_runs import rollouts, run_reincarnation, save_model
from ranks import run_on_ranks

pytestmark = pytest.mark.slow


def test_the_reference_takes_the_actors_weights_and_the_optimizer_begins_anew(tmp_path):
    save_model(tmp_path / "model")
    folder = tmp_path / "reincarnated"
    results = run_on_ranks((1, 2), run_reincarnation, tmp_path / "model", rollouts(4, seed=0), folder)
    for found in (each for by_rank in results.values() for each in by_rank):
        assert found["after an update"] > 1e-3 and found["lost"] > 1e-3
        assert found["anew"] == found["restarted"] == 0
        assert found["states"] == found["states later"] > found["states anew"] == 0
    files = ["rank_0_of_1", "rank_0_of_2", "rank_1_of_2"]
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.safetensors" for name in files]
