"""The actor worker on verl's real FSDP2 engine: one decision for a mini-batch, however it is shared out."""

import math

import generate_gallery as gallery
import pytest
import torch
from actor_worker_runs import rollouts, run_layouts, run_packings, run_presets, run_seams, run_step_scale, save_model
from compose import composed
from omegaconf import OmegaConf
from ranks import run_on_ranks

from verl_m2po.actor import observed as observing
from verl_m2po.ground.verl_config import has_proximal_policy
from verl_m2po.losses.kernel import diagnostics
from verl_m2po.losses.kernel.mini_batch import MiniBatch
from verl_m2po.losses.step_scale import effective_sample_share

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


def keep_of_all_ranks(results, packing):
    keep = {}
    for records in results:
        keep.update(records[packing]["keep"])
    return [keep[row] for row in range(ROWS)]


def whole(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


@pytest.mark.parametrize(
    ("world_sizes", "loss"),
    [
        ((1, 2, 4), {"selected": "m2po"}),
        # A share that single micro-batches reach or miss by themselves, and steps so fine that bounds tell them apart.
        ((1, 2), {"selected": "bapo", "bapo": {"positive_share": 0.6, "low_step": 0.01, "high_step": 0.01}}),
    ],
)
def test_same_mask_gradient_and_metrics_for_every_dp_size_and_packing(model_folder, world_sizes, loss):
    rows = rollouts(ROWS, seed=0)
    results = run_on_ranks(world_sizes, run_packings, model_folder, rows, PACKINGS, loss, True)
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


@pytest.mark.parametrize("loss", ["vanilla", "m2po"])
def test_a_mini_batch_whose_rows_are_all_masked_has_no_gradient(seams, loss):
    """verl's mean over its tokens is then 0/0."""
    gradients = seams[f"{loss}, all masked"]["gradients"]
    assert gradients and not whole(gradients).any()


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


def test_the_mismatch_floor_outlives_a_restart(seams):
    assert seams["floor after a restart"] == seams["floor"]["metrics"]["actor/m2po/mismatch_floor"]


def test_an_advantage_that_is_not_a_number_is_one_error(seams):
    assert (
        "1 of " in seams["an advantage that is NaN"] and "algorithm.adv_estimator" in seams["an advantage that is NaN"]
    )


def test_past_the_ramp_no_micro_batch_is_asked_for_its_age(seams):
    looks = seams["looked at ages"]
    ahead, once = [2, 2, 2, 2], [ROWS]
    assert looks[0] == [*ahead, *once, *ahead]
    assert looks[4] == [*ahead, *once]


def test_logits_for_distillation_pass_through_to_verls_own_function():
    calls = []
    observed = observing.Observed(lambda **given: calls.append(given), MiniBatch(), True, lambda _rows: None)
    observed(student_logits="logits", data="rows")
    assert calls == [{"student_logits": "logits", "data": "rows"}]


def test_foreign_worker_is_refused_by_the_loss(seams):
    assert "scope=mini_batch needs the actor worker" in seams["verl's own worker"]


@pytest.fixture(scope="module")
def step_scale(model_folder):
    return run_on_ranks((1, 2), run_step_scale, model_folder, rollouts(ROWS, seed=0))


def test_the_step_is_scaled_by_the_responses_of_all_micro_batches_and_ranks(step_scale):
    log_weights = [row["noise"][row["response_mask"]].sum() for row in rollouts(ROWS, seed=0)[:-1]]
    share = effective_sample_share(torch.stack(log_weights))
    for records in (rank for ranks in step_scale.values() for rank in ranks):
        metrics = records["scaled"]["metrics"]
        assert metrics["actor/m2po/sequence_effective_sample_size"] == pytest.approx(share, rel=1e-4)
        assert metrics["actor/m2po/step_scale"] == pytest.approx(share**0.5, rel=1e-4)
        assert 0.2 < share < 0.8, "or the test would show nothing"
        plain, scaled = records["plain"]["moved"], records["scaled"]["moved"]
        assert (scaled - share**0.5 * plain).norm() < 1e-3 * plain.norm()
        assert records["scaled"]["lr"] == records["plain"]["lr"]


def test_without_it_nothing_is_logged_and_with_it_alone_nothing_else(step_scale):
    records = step_scale[1][0]
    assert records["plain"]["metrics"] == {}
    names = {"actor/m2po/sequence_effective_sample_size", "actor/m2po/step_scale"}
    assert set(records["scaled"]["metrics"]) == names


def test_beside_a_proximal_policy_the_ratio_is_still_that_to_the_behaviour_policy(step_scale):
    for records in step_scale[2]:
        observed, expected = records["proximal policy"]["metrics"], records["scaled"]["metrics"]
        for name, value in expected.items():
            assert observed[name] == pytest.approx(value, rel=1e-4), name
        assert observed["actor/m2po/second_moment_all"] > 0.01


@pytest.fixture(scope="module")
def presets(model_folder):
    actors = {}
    for name in gallery.presets():
        config = composed(f"loss={name}", "actor_rollout_ref.actor.policy_loss.diagnostics=true", "hardware=cpu")
        OmegaConf.resolve(config.actor_rollout_ref.actor)
        actors[name] = (config.actor_rollout_ref.actor, has_proximal_policy(config))
    return run_on_ranks((2,), run_presets, model_folder, rollouts(ROWS, seed=0), actors)[2]


OWN_METRICS = {
    "m2po": {"threshold_log_ratio"},
    "m2po_clip": {"threshold_log_ratio"},
    "m2po_tapered": {"threshold_log_ratio"},
    "vcpo": {"step_scale", "sequence_effective_sample_size"},
}


@pytest.mark.parametrize("name", gallery.presets())
def test_every_preset_trains_the_real_actor_worker_and_reports_the_same_diagnostics(presets, name):
    for records in presets:
        assert 0 < records[name]["moved"] < 1e-2
        for update in records[name]["updates"]:
            # The bounds of gspo and its like are so narrow that they may leave nothing of such old data.
            assert math.isfinite(update["loss"]) and 0 <= update["grad_norm"] < math.inf
            reported = {key.removeprefix("actor/m2po/") for key in update["metrics"]}
            assert reported == {*diagnostics.NAMES, *OWN_METRICS.get(name, ())}
            # The age of the data is in every method's ratio, whatever it does about it.
            assert update["metrics"]["actor/m2po/second_moment_all"] > 0.01


# Both ranks that share a sequence see all of its log-probs, gathered by verl.
LAYOUTS = {
    "one rank a sequence": {"sequence_parallel": 1},
    "two ranks a sequence": {"sequence_parallel": 2},
    "one row each, in bfloat16": {"dtype": "bf16"},
}


@pytest.fixture(scope="module")
def layouts(model_folder):
    rows = rollouts(ROWS, seed=0)
    arguments = (model_folder, rows, LAYOUTS, {"max_tokens": 48}, {"selected": "m2po"})
    return run_on_ranks((2, 4), run_layouts, *arguments)


def test_ranks_that_share_a_sequence_count_its_tokens_once(layouts):
    expected = layouts[2][0]["one rank a sequence"]
    keep = keep_of_all_ranks(layouts[2], "one rank a sequence")
    for size, by_rank in layouts.items():
        assert keep_of_all_ranks(by_rank, "two ranks a sequence") == keep, size
        for record in (records["two ranks a sequence"] for records in by_rank):
            gradient, expected_gradient = whole(record["gradients"]), whole(expected["gradients"])
            assert (gradient - expected_gradient).norm() < 1e-6 * expected_gradient.norm(), size
        answers = [records["two ranks a sequence"]["metrics"] for records in by_rank]
        assert [bool(metrics) for metrics in answers] == [True, False] * (size // 2)
        for metrics in filter(None, answers):
            assert metrics == pytest.approx(expected["metrics"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_sees_the_log_probs_of_the_look_ahead(layouts, layout):
    for records in layouts[2]:
        ahead = records[layout]["log_probs_ahead"]
        assert ahead and ahead.keys() == records[layout]["log_probs"].keys()
        for row, log_prob in records[layout]["log_probs"].items():
            assert torch.equal(log_prob, ahead[row]), row
