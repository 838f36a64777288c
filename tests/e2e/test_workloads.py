"""What people train, in the staleness modes: real runs, small ones."""

import math

import any_number_reward
import pytest
import unreliable_calculator
from mode_runs import (
    LORA,
    SEPARATE,
    UPDATES_PER_STEP,
    assert_every_place_was_trained_once,
    run_mode,
    trained_tokens,
    versions_by_step,
    with_tool,
)

from benchmarks.paced import SECONDS_PER_TOKEN
from verl_m2po.tasks import calculator

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

LENT = (
    "actor_rollout_ref.hybrid_engine=true",
    "actor_rollout_ref.rollout.nnodes=1",
    "trainer.v1.separate_async.hybrid_rollout.enable_switch=true",
)
KL_AND_ENTROPY = (
    "actor_rollout_ref.actor.use_kl_loss=true",
    "algorithm.use_kl_in_reward=true",
    "actor_rollout_ref.actor.entropy_coeff=0.01",
)
FILTERED = (
    "algorithm.filter_groups.enable=true",
    "algorithm.filter_groups.metric=acc",
    "algorithm.filter_groups.max_num_gen_batches=20",
)


def assert_groups_without_advantage_were_replaced(result, ledger) -> None:
    """They were counted under verl's name and ours, and none of them was trained."""
    counted = result.series("staleness/evicted_uninformative")
    assert sum(counted) > 0 == sum(result.series("staleness/evicted_failed"))
    assert result.series("training/filter_groups/evicted_samples") == [count for count in counted if count]
    set_aside = [group[1] for line in ledger for group in line.get("set_aside", [])]
    trained = [group[1] for line in ledger for group in line["groups"]]
    assert set_aside and not set(set_aside) & set(trained)
    # Of two answers to a prompt that are scored 0 or 1, one is right in every group that is trained.
    assert result.series("critic/score/max") == [1.0] * len(counted)
    assert result.series("critic/score/min") == [0.0] * len(counted)


def assert_kl_and_entropy_are_there(result, steps: int) -> None:
    """The first batch is the reference's own; from the first update on the policy is another one."""
    assert result.series("actor/kl_loss")[-1] > 0
    penalty = result.series("actor/reward_kl_penalty")
    assert abs(penalty[0]) < 5e-3 and abs(penalty[-1]) > abs(penalty[0]) and len(penalty) == steps
    assert all(value > 0 for value in result.series("actor/entropy_loss"))


def assert_tool_tokens_are_there_and_untrained(result, ledger, rows_per_step: int) -> None:
    """The answers of the tool stand in the responses; the ledger and the trainer know the generated tokens alone."""
    trained = result.series("staleness/trained_tokens")
    assert trained == trained_tokens(ledger, steps=len(trained))
    assert max(result.series("num_turns/mean")) > 3, "no row has a question, a call, its answer and a turn after it"
    for responses, generated in zip(result.series("response_length/mean"), trained, strict=True):
        assert responses * rows_per_step > 1.2 * generated


@pytest.mark.feature("an agent with a tool, several turns", mode="stale_k")
@pytest.mark.feature("dynamic sampling", mode="stale_k")
@pytest.mark.feature("LoRA", mode="stale_k")
def test_an_agent_calls_a_tool_over_several_turns_that_are_all_as_old_as_promised(train, tmp_path):
    """A tool that is slow, raises, or returns 10,000 characters; adapters; groups without advantage are replaced."""
    steps = 4
    tool = with_tool(unreliable_calculator.__file__, any_number_reward.__file__)
    result, ledger = run_mode(train, tmp_path, "stale_k", UPDATES_PER_STEP, *FILTERED, *LORA, *tool, steps=steps)
    assert versions_by_step(ledger) == {step: {max(0, step - 2)} for step in range(1, steps + 1)}
    assert_every_place_was_trained_once(ledger, steps)
    assert_groups_without_advantage_were_replaced(result, ledger)
    assert_tool_tokens_are_there_and_untrained(result, ledger, rows_per_step=32)
    # The first turn alone is behind an answer of 10,000 characters: it never came into the row.
    assert max(result.series("response_length/max")) <= 64
    # At age zero, in float32, the trainer gives every generated token the probability that it was drawn with.
    assert max(result.series("actor/m2po/mismatch_floor")) < 1e-9


@pytest.mark.feature("an agent with a tool, several turns", mode="bounded_async")
@pytest.mark.feature("dynamic sampling", mode="bounded_async")
@pytest.mark.feature("a critic (`gae`)", mode="bounded_async")
@pytest.mark.feature("a reference model, KL in the loss", mode="bounded_async")
@pytest.mark.feature("KL in the reward", mode="bounded_async")
@pytest.mark.feature("an entropy bonus", mode="bounded_async")
@pytest.mark.feature("a journal", mode="bounded_async")
@pytest.mark.feature("an adaptive bound", mode="bounded_async")
@pytest.mark.feature("training devices lent to the rollout", mode="bounded_async")
def test_turns_that_a_weight_update_interrupts_have_their_versions_in_the_ledger(train, tmp_path, tiny):
    """Turns go on with newer weights, or at another server, after the tool's answer and before it.

    0.5 s a token: about twice as long for an answer as for a trainer step, or none would be interrupted.
    """
    steps, bound_steps = 5, 1
    adaptive = "trainer.v1.bounded_async.adaptive"
    result, ledger = run_mode(
        train,
        tmp_path,
        "bounded_async",
        bound_steps * UPDATES_PER_STEP,
        *LENT,
        *FILTERED,
        *with_tool(calculator.__file__, any_number_reward.__file__),
        "algorithm.adv_estimator=gae",
        f"critic.model.path={tiny}",
        *KL_AND_ENTROPY,
        "++trainer.v1.bounded_async.journal=true",
        f"trainer.default_local_dir={tmp_path / 'saved'}",
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.logits_processors=benchmarks.paced.token_time:TokenTime",
        f"++{adaptive}.enable=true",
        f"++{adaptive}.max_staleness_updates={bound_steps * UPDATES_PER_STEP}",
        # Every step is above it; the last one is the one too many.
        f"++{adaptive}.target_second_moment=1e-12",
        f"++{adaptive}.patience_steps={steps}",
        steps=steps,
        environment={SECONDS_PER_TOKEN: "0.5"},
    )
    assert result.series("staleness/bound_updates") == [bound_steps * UPDATES_PER_STEP] * steps
    assert result.series("staleness/bound_lowered_by_second_moment") == [0.0] * (steps - 1) + [1.0]
    assert min(result.series("staleness/bound_load")) > 1
    assert max(result.series("staleness/age_updates_max")) <= bound_steps * UPDATES_PER_STEP
    assert_groups_without_advantage_were_replaced(result, ledger)
    assert_tool_tokens_are_there_and_untrained(result, ledger, rows_per_step=32)
    assert all(math.isfinite(value) for value in result.series("critic/vf_loss"))
    assert_kl_and_entropy_are_there(result, steps)
    assert any(len(row[1]) > 1 for line in ledger for group in line["groups"] for row in group[3])
    # The training devices take part in generation before the first step, and wherever verl has decided so.
    decided = [1.0, *result.series("separate_async/decision/should_switch_to_rollout")]
    waited_s = result.series("timing_s/switch_wait")
    assert waited_s[0] > 0 and len(waited_s) == steps == len(decided) - 1
    assert all(decision for decision, seconds in zip(decided, waited_s, strict=False) if seconds > 0)


@pytest.mark.feature("LoRA", mode="stale_k_separate")
@pytest.mark.feature("dynamic sampling", mode="stale_k_separate")
@pytest.mark.feature("a reference model, KL in the loss", mode="stale_k_separate")
@pytest.mark.feature("KL in the reward", mode="stale_k_separate")
@pytest.mark.feature("an entropy bonus", mode="stale_k_separate")
@pytest.mark.feature("`ppo_epochs=2`", mode="stale_k_separate")
def test_what_is_trained_of_adapters_is_what_the_rollout_serves(train, tmp_path):
    """A high learning rate, and the base as reference policy. A rollout with the base alone is soon far away."""
    steps = 4
    result, ledger = run_mode(
        train,
        tmp_path,
        "stale_k_separate",
        0,
        *SEPARATE,
        *LORA,
        *FILTERED,
        *KL_AND_ENTROPY,
        "actor_rollout_ref.actor.ppo_epochs=2",
        "actor_rollout_ref.actor.optim.lr=0.01",
        steps=steps,
    )
    assert versions_by_step(ledger) == {step: {step - 1} for step in range(1, steps + 1)}
    assert_every_place_was_trained_once(ledger, steps)
    assert_groups_without_advantage_were_replaced(result, ledger)
    # Merged weights travel as bfloat16.
    assert max(result.series("actor/m2po/mismatch_floor")) < 1e-3
    assert_kl_and_entropy_are_there(result, steps)
    assert result.series("actor/kl_loss")[-1] > 0.02, "the policy has not moved far enough to tell it from the base"
    (difference_nats,) = result.series("staleness/served_difference_nats")
    assert 0 < difference_nats < 0.05, "compared once, after the first push of trained weights"
