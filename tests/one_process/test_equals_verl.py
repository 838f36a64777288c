"""The experiment bench is verl without the processes: the same updates on the same batches."""

import pytest
from one_process_runs import run_both
from ranks import run_on_ranks

pytestmark = pytest.mark.slow

LOSSES = ("m2po", "grpo", "gspo", "decoupled_ppo", "ppo_ewma", "vcpo", "m2po_by_micro_batch")
STEPS = 3
# Their denominators count tokens by the sign of log r, which rounding decides where a probability has not moved.
BY_SIGN = {
    f"actor/m2po/{name}"
    for name in (
        *("trust_region_fraction", "masked_fraction_trust_region"),
        *("second_moment_before", "second_moment_after"),
    )
}


@pytest.fixture(scope="module")
def runs(tiny):
    return run_on_ranks((1,), run_both, LOSSES, tiny, STEPS)[1][0]


@pytest.mark.parametrize("loss", LOSSES)
def test_first_steps_give_the_weights_that_verl_gets(runs, loss):
    ours, verls = runs[loss]
    assert ours["parameters"].keys() == verls["parameters"].keys()
    for name, parameter in ours["parameters"].items():
        # Adam turns rounding of tiny gradients into steps of up to the learning rate, 3e-3: look at the whole.
        assert (parameter - verls["parameters"][name]).norm() < 1e-3 * parameter.norm(), name


@pytest.mark.parametrize("loss", LOSSES)
def test_metrics_of_every_update_are_verls(runs, loss):
    ours, verls = runs[loss]
    for step, (mine, theirs) in enumerate(zip(ours["metrics"], verls["metrics"], strict=True)):
        theirs = {"actor/" + name if name in ("grad_norm", "lr") else name: values for name, values in theirs.items()}
        shared = mine.keys() & theirs.keys()
        assert {"actor/pg_loss", "actor/grad_norm", "actor/lr"} <= shared
        assert {name for name in theirs if name.startswith("actor/")} <= mine.keys()
        for name in shared - BY_SIGN:
            # The proximal policy in the batch is the bench's, from which verl's weights have drifted by rounding.
            least = 1e-3 if loss == "decoupled_ppo" else 1e-5
            # Its denominator is the square of ratios, of which the largest is several times the others'.
            most = 1e-2 if name == "actor/m2po/effective_sample_size" else 2e-3
            assert mine[name] == pytest.approx(theirs[name], rel=most, abs=least), (step, name)


def test_old_batches_are_masked_and_clipped(runs):
    def of_stale_steps(loss, metric):
        return [value for step in runs[loss][0]["metrics"][1:] for value in step[metric]]

    assert any(of_stale_steps("m2po", "actor/m2po/masked_fraction"))
    assert any(of_stale_steps("grpo", "actor/pg_clipfrac"))
    assert max(of_stale_steps("m2po", "actor/m2po/second_moment_after")) <= 0.004 * 1.001
    assert min(of_stale_steps("vcpo", "actor/m2po/step_scale")) < 0.999


def test_micro_batches_decide_for_themselves(runs):
    by_mini_batch, by_micro_batch = (
        [step["actor/m2po/threshold_log_ratio"] for step in runs[loss][0]["metrics"]]
        for loss in ("m2po", "m2po_by_micro_batch")
    )
    assert by_mini_batch[1] != by_micro_batch[1]


def test_the_ratio_to_the_proximal_policy_begins_at_one_in_every_step(runs):
    for step in runs["decoupled_ppo"][0]["metrics"]:
        first, *others = step["actor/ppo_kl"]
        assert abs(first) < 1e-6 and max(map(abs, others)) > 1e-4
