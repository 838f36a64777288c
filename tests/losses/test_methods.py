"""Laws that hold for every method's loss."""

import inspect

import pytest
import torch
from method_losses import (
    FAMILIES,
    actor_config,
    evaluate,
    looked_ahead,
    on_policy,
    random_tensors,
    reinforce_gradient,
)
from torch.testing import assert_close
from verl.trainer.ppo.core_algos import get_policy_loss_fn

from verl_m2po.losses.family.rec import MEMBERS

SEVEN = [
    "old_log_prob",
    "log_prob",
    "advantages",
    "response_mask",
    "loss_agg_mode",
    "config",
    "rollout_is_weights",
]
# Every importance-weighted loss, on-policy, is REINFORCE. oapl is a regression and no importance weighting.
IMPORTANCE_WEIGHTED = [name for name in FAMILIES if name != "oapl"]


@pytest.mark.parametrize("name", [*FAMILIES, "opsm"])
def test_registered_signature(name):
    assert list(inspect.signature(get_policy_loss_fn(name)).parameters) == SEVEN
    assert get_policy_loss_fn(name).__doc__


@pytest.mark.parametrize("name", IMPORTANCE_WEIGHTED)
@pytest.mark.parametrize("seed", range(2))
def test_on_policy_it_is_reinforce(name, seed):
    tensors = on_policy(random_tensors(seed))
    _, gradient, _ = evaluate(name, tensors, settings=FAMILIES[name])
    assert_close(gradient, reinforce_gradient(tensors))


def test_on_policy_oapl_is_reinforce_over_responses():
    tensors = on_policy(random_tensors(1))
    _, gradient, _ = evaluate("oapl", tensors, settings={"unit_gradient": True})
    mask = tensors["response_mask"]
    assert_close(gradient, torch.where(mask, -tensors["advantages"], 0.0) / mask.any(-1).sum())


EXTREMES = [100.0, -100.0, 1e15, -1e15, float("inf"), -float("inf"), float("nan")]
VARIANTS = [
    *FAMILIES.items(),
    *[("rec", {k: v for k, v in vars(m).items() if k != "_target_"}) for m in MEMBERS.values()],
    *[("topr", {"level": level}) for level in ("token", "geometric")],
    ("bapo", {"order": "low_first", "weight": "none", "dual_clip": 3.0, "scope": "micro_batch"}),
    ("decoupled_loglinear", {"alpha": 1.0, "ratio_cap": float("inf")}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize(("name", "values"), VARIANTS)
def test_the_gradient_is_finite_at_the_extremes(name, values, extreme, dtype):
    for advantage in (-1.0, 0.0, 1.0):
        tensors = {key: value.to(dtype) for key, value in random_tensors(5).items() if key != "response_mask"}
        tensors["response_mask"] = torch.ones(6, 9, dtype=torch.bool)
        tensors["advantages"] = torch.full_like(tensors["advantages"], advantage)
        tensors["log_prob"][:2] = tensors["old_log_prob"][:2] + extreme
        tensors["log_prob"][2, 0] = tensors["old_log_prob"][2, 0] + extreme
        loss, gradient, _ = evaluate(name, tensors, settings=values)
        assert gradient.isfinite().all() and loss.isfinite()
        assert gradient.dtype == dtype


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_a_micro_batch_with_everything_masked(name, mode):
    tensors = random_tensors(5)
    tensors["response_mask"] = torch.zeros(6, 9, dtype=torch.bool)
    log_prob = tensors["log_prob"].clone().requires_grad_()
    config = actor_config(name, **{name: FAMILIES[name]})
    # As verl trains: sizes are those of the whole mini-batch.
    config.global_batch_info.update(dp_size=1, batch_num_tokens=10, global_batch_size=4)
    with looked_ahead(name, tensors["old_log_prob"]):
        loss, _ = get_policy_loss_fn(name)(
            **{**tensors, "log_prob": log_prob},
            loss_agg_mode="seq-mean-token-sum" if name == "oapl" else mode,
            config=config,
            rollout_is_weights=torch.ones(6, 9) if name == "mix_ppg" else None,
        )
    loss.backward()
    assert loss == 0 and (log_prob.grad == 0).all()


@pytest.mark.parametrize(("name", "values"), VARIANTS)
def test_masked_tokens_do_not_matter(name, values):
    tensors = random_tensors(6)
    spoiled = {key: value.clone() for key, value in tensors.items()}
    outside = ~tensors["response_mask"]
    spoiled["log_prob"][outside] = float("nan")
    spoiled["old_log_prob"][outside] = -1e4
    plain, garbage = (evaluate(name, t, settings=values) for t in (tensors, spoiled))
    assert_close(plain[:2], garbage[:2])


@pytest.mark.parametrize(("name", "values"), VARIANTS)
def test_responses_may_come_in_any_order(name, values):
    tensors = random_tensors(7)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    shuffled = {key: value[order] for key, value in tensors.items()}
    loss, gradient, _ = evaluate(name, tensors, settings=values)
    moved_loss, moved_gradient, _ = evaluate(name, shuffled, settings=values)
    assert_close((moved_loss, moved_gradient), (loss, gradient[order]))


# Those of vespo are part of its ratio, see test_vespo.py.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("bapo", "mix_ppg", "vespo")])
def test_rollout_correction_weights_multiply_each_token(name):
    tensors = random_tensors(8)
    weights = torch.rand(6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, plain, _ = evaluate(name, tensors, settings=FAMILIES[name])
    _, weighted, _ = evaluate(name, tensors, settings=FAMILIES[name], rollout_is_weights=weights)
    assert_close(weighted, plain * weights)


# bapo's bounds couple the micro-batches: see test_bapo.py.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "bapo"])
def test_micro_batches_add_up_to_the_mini_batch(name):
    tensors = random_tensors(9)
    tensors["response_mask"][0, 0] = True
    config = actor_config(name, **{name: FAMILIES[name]})
    mask = tensors["response_mask"]
    config.global_batch_info.update(dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=6)
    total = 0.0
    for rows in (slice(0, 2), slice(2, 6), slice(0, 6)):
        part = {key: value[rows] for key, value in tensors.items()}
        with looked_ahead(name, part["old_log_prob"]):
            loss, _ = get_policy_loss_fn(name)(
                **part,
                loss_agg_mode="seq-mean-token-sum" if name == "oapl" else "token-mean",
                config=config,
                rollout_is_weights=torch.ones_like(part["log_prob"]) if name == "mix_ppg" else None,
            )
        whole = loss.item()
        if rows != slice(0, 6):
            total += whole
    assert_close(total, whole)


@pytest.mark.parametrize("name", FAMILIES)
def test_old_log_probs_that_require_grad_are_refused(name):
    tensors = random_tensors(1)
    tensors["old_log_prob"].requires_grad_()
    with pytest.raises(ValueError, match="old_log_prob requires grad"):
        evaluate(name, tensors, settings=FAMILIES[name])
