"""m2po, m2po_clip and no_trust_region: reference values, laws, finite gradients."""

import math

import pytest
import torch
from token_batches import heavy_tailed
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, get_policy_loss_fn
from verl.workers.config import FSDPActorConfig

from verl_m2po.losses.config import M2POPolicyLossConfig
from verl_m2po.losses.family.m2po_clip import clip_bound
from verl_m2po.losses.kernel.mini_batch import MiniBatch, training
from verl_m2po.second_moment import find_trust_region, keep_mask

OURS = ("m2po", "m2po_clip", "no_trust_region")
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")

LOG_PROB = [[-0.5, -1.0, -2.0], [-0.4, -1.5, -3.0]]
OLD_LOG_PROB = [[-0.7, -1.0, -1.2], [-0.9, -0.5, -3.0]]
ADVANTAGES = [[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]
RESPONSE_MASK = [[True, True, True], [True, True, False]]


def actor_config(threshold=0.04, **settings):
    policy_loss = M2POPolicyLossConfig(
        m2po={"threshold": threshold, "scope": "micro_batch"}, m2po_clip={"threshold": threshold}, **settings
    )
    return FSDPActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy_loss)


def evaluate(name, log_prob, old_log_prob, advantages, response_mask, config=None, mode="token-mean", weights=None):
    """Loss, gradient and metrics, called as verl calls a loss."""
    log_prob = torch.as_tensor(log_prob).clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(name)(
        old_log_prob=torch.as_tensor(old_log_prob),
        log_prob=log_prob,
        advantages=torch.as_tensor(advantages),
        response_mask=torch.as_tensor(response_mask),
        loss_agg_mode=mode,
        config=config or actor_config(),
        rollout_is_weights=weights,
    )
    loss.backward()
    return loss.detach(), log_prob.grad, metrics


def example(name, **options):
    return evaluate(name, LOG_PROB, OLD_LOG_PROB, ADVANTAGES, RESPONSE_MASK, **options)


def batch(seed=0, dtype=torch.float32):
    """log_prob, old_log_prob, advantages, response_mask."""
    log_ratio, advantages, response_mask = heavy_tailed(6, 40, seed, dtype)
    old_log_prob = torch.full_like(log_ratio, -1.0)
    return (old_log_prob + log_ratio.clamp(-15, 15)).to(dtype), old_log_prob, advantages, response_mask


# r = [1.221403, 1, .449329], [1.648721, .367879, 1]. Trust region: r = 1.221403 (A > 0) and r = .367879 (A < 0), with
# squares .04 and 1, so m2po drops the second. Sum of -A r over five tokens: -1.22140 - 1 - .44933 + 1.64872 = -1.02201.
def test_m2po_reference_value():
    loss, gradient, _ = example("m2po")
    assert loss == pytest.approx(-0.204402, abs=1e-6)
    expected = torch.tensor([[-1.221403, -1.0, -0.449329], [1.648721, 0.0, 0.0]]) / 5
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_no_trust_region_reference_value():
    assert example("no_trust_region")[0] == pytest.approx(-0.130826, abs=1e-6)


def test_clip_reference_values():
    # Squares .01 .04 .36 4 with budget .3: clipping at .36 leaves 1.13, at 4 it leaves 4.41 >= 1.2, so tau = .6.
    magnitude = torch.tensor([0.1, 0.0, 2.0, 0.6, 0.2])
    assert clip_bound(magnitude, 0.3) == pytest.approx(0.6)
    # The second moment of T is (.04 + 1) / 2 = .52, within .6: nothing is clipped.
    assert example("m2po_clip", config=actor_config(0.6))[0] == pytest.approx(-0.130826, abs=1e-6)


def test_clip_takes_the_gradient_of_what_it_bounds_and_keeps_its_value():
    # Budget .039 x 2: clipping at .04 leaves .08, too much, so tau = 0, and both trust-region tokens stay at r = 1:
    # -1 - 1 - .44933 + 1.64872 + 1 = .19939.
    loss, gradient, _ = example("m2po_clip", config=actor_config(0.039))
    assert loss == pytest.approx(0.199392 / 5, abs=1e-6)
    assert gradient[0, 0] == 0 and gradient[1, 1] == 0
    assert gradient[0, 2] == pytest.approx(-0.449329 / 5, abs=1e-6)


@pytest.mark.parametrize("magnitude", [[1e-8, 1e-7, 3.0], [0.0, 0.0], [5.0], [1e-30, 1e-30]])
@pytest.mark.parametrize("budget", [1e-12, 0.04])
def test_clip_survives_what_breaks_the_released_code(magnitude, budget):
    tau = clip_bound(torch.tensor(magnitude), budget)
    assert tau >= 0 and not tau.isnan()


@pytest.mark.parametrize("seed", range(5))
def test_clip_takes_the_gradient_from_a_superset_of_what_m2po_drops(seed):
    log_prob, old_log_prob, advantages, response_mask = batch(seed)
    _, masked, _ = evaluate("m2po", log_prob, old_log_prob, advantages, response_mask)
    _, clipped, _ = evaluate("m2po_clip", log_prob, old_log_prob, advantages, response_mask)
    dropped = response_mask & (masked == 0) & (advantages != 0)
    assert dropped.any() and (clipped[dropped] == 0).all()
    assert (clipped == 0).sum() > (masked == 0).sum()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_on_policy_gradient_is_reinforce(name, mode):
    log_prob, _, advantages, response_mask = batch()
    _, gradient, _ = evaluate(name, log_prob, log_prob, advantages, response_mask, mode=mode)
    reference = log_prob.clone().requires_grad_()
    agg_loss(-advantages * reference, response_mask, mode).backward()
    assert torch.allclose(gradient, reference.grad, rtol=1e-6)


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("name", ["m2po", "m2po_clip"])
def test_infinite_threshold_is_plain_importance_weighting(name, mode):
    arguments = batch()
    loss, gradient, _ = evaluate(name, *arguments, config=actor_config(math.inf), mode=mode)
    plain_loss, plain_gradient, _ = evaluate("no_trust_region", *arguments, mode=mode)
    assert torch.equal(loss, plain_loss) and torch.equal(gradient, plain_gradient)


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_m2po_equals_autograd_through_the_written_out_surrogate(mode, weighted):
    log_prob, old_log_prob, advantages, response_mask = batch(seed=1)
    weights = torch.rand_like(log_prob) if weighted else None
    loss, gradient, _ = evaluate("m2po", log_prob, old_log_prob, advantages, response_mask, mode=mode, weights=weights)
    reference = log_prob.clone().requires_grad_()
    keep = keep_mask(log_prob - old_log_prob, advantages, response_mask, 0.04)
    surrogate = -advantages * torch.exp(reference - old_log_prob) * keep * (1 if weights is None else weights)
    expected = agg_loss(surrogate, response_mask, mode)
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-6) and torch.allclose(gradient, reference.grad, rtol=1e-5)
    assert (gradient[response_mask & ~keep] == 0).all()


@pytest.mark.parametrize("name", OURS)
def test_sum_over_micro_batches_is_the_whole_with_the_size_of_the_mini_batch(name):
    arguments = batch(seed=2)
    config = actor_config(math.inf)
    config.global_batch_info.update(dp_size=1, batch_num_tokens=int(arguments[3].sum()), global_batch_size=6)
    loss, gradient, _ = evaluate(name, *arguments, config=config)
    parts = [evaluate(name, *(a[rows] for a in arguments), config=config) for rows in (slice(0, 1), slice(1, 6))]
    assert torch.allclose(loss, parts[0][0] + parts[1][0], rtol=1e-6)
    assert torch.allclose(gradient, torch.cat([parts[0][1], parts[1][1]]), rtol=1e-6)


@pytest.mark.parametrize("name", OURS)
def test_gradients_are_finite_whatever_the_log_probs(name):
    log_prob, old_log_prob, advantages, response_mask = batch()
    poison = torch.tensor([math.nan, math.inf, -math.inf, 200.0, -200.0])
    for clean, dirty in ((log_prob, old_log_prob), (old_log_prob, log_prob)):
        dirty = dirty.clone()
        dirty[:, :5] = poison
        response_mask[:, :5] = True
        pair = (clean, dirty) if clean is log_prob else (dirty, clean)
        loss, gradient, _ = evaluate(name, *pair, advantages, response_mask)
        assert loss.isfinite() and gradient.isfinite().all()
        assert (gradient[:, :3] == 0).all()


@pytest.mark.parametrize("name", OURS)
def test_no_gradient_beyond_the_log_ratio_at_which_verl_clamps(name):
    # A < 0 and r > 1: no trust region bounds this token, and exp(25) would drown all others.
    loss, gradient, _ = evaluate(name, [[-1.0, -1.0]], [[-26.0, -1.5]], [[-1.0, -1.0]], [[True, True]])
    assert gradient[0, 0] == 0 and gradient[0, 1] == pytest.approx(math.exp(0.5) / 2)
    assert loss == pytest.approx(math.exp(0.5) / 2)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("case", ["no response", "everything dropped", "nothing dropped"])
def test_empty_and_full_masks_have_finite_gradients(name, case):
    log_prob, old_log_prob, advantages, response_mask = batch()
    config = actor_config(1e-12 if case == "everything dropped" else 1e6)
    config.global_batch_info.update(batch_num_tokens=100, global_batch_size=6)
    if case == "no response":
        response_mask = torch.zeros_like(response_mask)
    if case == "everything dropped":
        log_prob, advantages = old_log_prob + 1, torch.ones_like(advantages)
    loss, gradient, _ = evaluate(name, log_prob, old_log_prob, advantages, response_mask, config=config)
    assert loss.isfinite() and gradient.isfinite().all()
    if case == "everything dropped":
        assert (gradient == 0).all() == (name != "no_trust_region")


@pytest.mark.parametrize("name", OURS)
def test_bfloat16_log_probs_are_compared_in_float32(name):
    arguments = batch(seed=3, dtype=torch.bfloat16)
    _, gradient, _ = evaluate(name, *arguments)
    _, expected, _ = evaluate(name, *(a.float() for a in arguments[:3]), arguments[3])
    assert gradient.dtype == torch.bfloat16
    assert torch.equal(gradient != 0, expected != 0)
    assert torch.allclose(gradient.float(), expected, rtol=1e-2)


def test_threshold_of_the_mini_batch_is_used_where_one_was_decided():
    log_prob, old_log_prob, advantages, response_mask = batch()
    config = actor_config()
    object.__setattr__(config.policy_loss.m2po, "scope", "mini_batch")
    with training(MiniBatch(decision=find_trust_region([torch.tensor([0.1, 9.0])], 0.04))) as mini_batch:
        _, gradient, metrics = evaluate("m2po", log_prob, old_log_prob, advantages, response_mask, config=config)
    beyond = (
        torch.sign(advantages) * (log_prob - old_log_prob) > mini_batch.decision.threshold_log_ratio
    ) & response_mask
    assert torch.equal(beyond, response_mask & (gradient == 0) & (advantages != 0))
    # The actor worker collects the sums; nothing is left for verl to average.
    assert metrics == {} and len(mini_batch.sums) == 1


def test_mini_batch_scope_without_our_worker_is_refused():
    config = actor_config()
    object.__setattr__(config.policy_loss.m2po, "scope", "mini_batch")
    with pytest.raises(RuntimeError, match=r"M2POTrainingWorker.*m2po\.scope=micro_batch"):
        evaluate("m2po", *batch(), config=config)


def test_second_call_for_a_mini_batch_of_one_piece_is_refused():
    config = actor_config()
    object.__setattr__(config.policy_loss.m2po, "scope", "mini_batch")
    with training(MiniBatch(decide_in_loss=True)):
        evaluate("m2po", *batch(), config=config)
        with pytest.raises(RuntimeError, match="called twice"):
            evaluate("m2po", *batch(), config=config)


def test_logged_sums_of_micro_batches_add_up():
    arguments = batch(seed=4)
    config = actor_config(math.inf)
    config.global_batch_info.update(batch_num_tokens=100)
    _, _, metrics = evaluate("m2po", *arguments, config=config)
    parts = [evaluate("m2po", *(a[rows] for a in arguments), config=config)[2] for rows in (slice(0, 1), slice(1, 6))]
    for name, value in metrics.items():
        assert parts[0][name] + parts[1][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("name", OURS)
def test_bad_input_is_named(name):
    log_prob, old_log_prob, advantages, response_mask = batch()
    with pytest.raises(ValueError, match="old_log_prob has shape"):
        evaluate(name, log_prob, old_log_prob[:2], advantages, response_mask)
    with pytest.raises(ValueError, match="old_log_prob requires grad"):
        evaluate(name, log_prob, old_log_prob.requires_grad_(), advantages, response_mask)
    with pytest.raises(ValueError, match="response_mask has shape"):
        evaluate(name, log_prob, old_log_prob.detach(), advantages, response_mask[:2])


def test_importing_registers_once():
    import importlib

    before = {name: POLICY_LOSS_REGISTRY[name] for name in OURS}
    importlib.import_module("verl_m2po.losses")
    assert {name: POLICY_LOSS_REGISTRY[name] for name in OURS} == before
