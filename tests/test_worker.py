"""The actor worker on verl's real FSDP2 engine: one decision for a mini-batch, however it is shared out."""

import pytest
import torch
from actor_worker_runs import rollouts, run_packings, save_model
from ranks import run_on_ranks

ROWS = 8
# 20 + 3 tokens at most in a row.
PACKINGS = {
    "one row each": {"micro_batch_size": 1},
    "two rows each": {"micro_batch_size": 2},
    "by tokens": {"max_tokens": 48},
    "in one piece": {"max_tokens": 4096},
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def keep_of_all_ranks(results, packing):
    keep = {}
    for records in results:
        keep.update(records[packing]["keep"])
    return [keep[row] for row in range(ROWS)]


def test_same_mask_gradient_and_metrics_for_every_dp_size_and_packing(model_folder):
    rows = rollouts(ROWS, seed=0)
    loss = {"selected": "m2po"}
    results = {size: run_on_ranks(size, run_packings, model_folder, rows, PACKINGS, loss, True) for size in (1, 2, 4)}
    expected = results[1][0]["in one piece"]
    keep = keep_of_all_ranks(results[1], "in one piece")
    assert 0 < expected["metrics"]["actor/m2po/masked_fraction"] < 1
    for size, by_rank in results.items():
        for packing in PACKINGS:
            assert keep_of_all_ranks(by_rank, packing) == keep, (size, packing)
            for record in (records[packing] for records in by_rank):
                for name, gradient in expected["gradients"].items():
                    error = (record["gradients"][name] - gradient).norm() / gradient.norm()
                    assert error < 1e-6, (size, packing, name)
                for name, value in expected["metrics"].items():
                    if name.startswith("actor/m2po/"):
                        assert record["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-7), (size, packing, name)
