"""The actor worker on verl's real FSDP2 engine: one decision for a mini-batch, however it is shared out."""

import pytest
import torch
from actor_worker_runs import rollouts, run_packings, run_seams, save_model
from ranks import run_on_ranks

pytestmark = pytest.mark.slow

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


def whole(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def test_same_mask_gradient_and_metrics_for_every_dp_size_and_packing(model_folder):
    rows = rollouts(ROWS, seed=0)
    loss = {"selected": "m2po"}
    results = run_on_ranks((1, 2, 4), run_packings, model_folder, rows, PACKINGS, loss, True)
    expected = results[1][0]["in one piece"]
    keep = keep_of_all_ranks(results[1], "in one piece")
    assert 0 < expected["metrics"]["actor/m2po/masked_fraction"] < 1
    for size, by_rank in results.items():
        for packing in PACKINGS:
            assert keep_of_all_ranks(by_rank, packing) == keep, (size, packing)
            for record in (records[packing] for records in by_rank):
                gradient, expected_gradient = whole(record["gradients"]), whole(expected["gradients"])
                assert (gradient - expected_gradient).norm() < 1e-6 * expected_gradient.norm(), (size, packing)
                for name, value in expected["metrics"].items():
                    if name.startswith("actor/m2po/"):
                        assert record["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-7), (
                            size,
                            packing,
                            name,
                        )


@pytest.fixture(scope="module")
def seams(model_folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("VERL_PLATFORM", "cpu")
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
        ages = [0, 0] + [4] * (ROWS - 2)
        return run_on_ranks((1,), run_seams, model_folder, rollouts(ROWS, seed=0, ages=ages))[1][0]


def test_other_losses_are_left_alone(seams):
    assert seams["vanilla"]["forward_only_passes"] == 0
    assert not seams["vanilla"]["metrics"]


def test_statistics_of_any_loss_are_those_of_the_whole_mini_batch(seams):
    # vanilla leaves no sums itself; no_trust_region does, for the same tokens and without a mask either.
    observed, own = seams["vanilla with diagnostics"]["metrics"], seams["no_trust_region"]["metrics"]
    assert own.keys() == observed.keys()
    for name in own:
        assert observed[name] == pytest.approx(own[name], rel=1e-6), name
    assert torch.equal(whole(seams["vanilla with diagnostics"]["gradients"]), whole(seams["vanilla"]["gradients"]))


def test_micro_batches_that_decide_alone_mask_otherwise_and_need_no_look_ahead(seams):
    assert seams["m2po by micro_batch"]["forward_only_passes"] == 0
    assert seams["m2po by micro_batch"]["keep"] != seams["two mini-batches, two epochs"]["keep"]


def test_one_look_ahead_for_each_update(seams):
    record = seams["two mini-batches, two epochs"]
    assert record["forward_only_passes"] == 4
    assert len(record["metrics"]["actor/m2po/masked_fraction"]) == 4


def test_mismatch_floor_needs_ages(seams):
    assert "age_updates" in seams["floor without ages"]


def test_mismatch_floor_is_measured_on_tokens_of_age_zero_and_added_to_the_threshold(seams):
    rows = rollouts(ROWS, seed=0)[:2]
    noise = torch.cat([row["noise"][row["response_mask"]] for row in rows])
    first, second = seams["floor"]["metrics"], seams["floor, second update"]["metrics"]
    floor = noise.double().square().mean().item()
    assert first["actor/m2po/mismatch_floor"] == pytest.approx(floor, rel=1e-4)
    assert second["actor/m2po/mismatch_floor"] == first["actor/m2po/mismatch_floor"]
    assert first["actor/m2po/second_moment_after"] <= 0.04 + floor * 1.001


def test_foreign_worker_is_refused_by_the_loss(seams):
    assert "scope=mini_batch needs the actor worker" in seams["verl's own worker"]
