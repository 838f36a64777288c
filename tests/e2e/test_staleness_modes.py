"""The staleness modes end to end: the version of every trained row, from the ledger."""

import math

import failing_rewards
import pytest
from mode_runs import (
    BATCH,
    SEPARATE,
    STEPS,
    TINY_BATCHES,
    UPDATES_PER_STEP,
    assert_every_place_was_trained_once,
    assert_exactly_k_steps_old,
    paced,
    run_mode,
    spans_of,
    versions_by_step,
)

from benchmarks.paced import SECONDS_PER_TOKEN
from benchmarks.paced.agent_loop import Lengths
from verl_m2po.staleness.account.ledger import read_ledger
from verl_m2po.staleness.restart.checkpoint import POINTER, Checkpoints, flaws

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.mark.feature("validation while training", mode="stale_k")
def test_no_staleness_is_verls_synchronous_mode(train, tmp_path):
    """k = 0 against `sync`, two ranks, one update a step: the same samples, so the same losses, step by step.

    What is sampled must not depend on which requests happen to share a batch: every response has a seed of its own.
    """
    steps = 4
    same = (
        *paced(tmp_path, is_seeded=True),
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "trainer.n_gpus_per_node=2",
        "trainer.test_freq=4",
    )
    sync = train(f"trainer.total_training_steps={steps}", *same)
    # One update a step: the ratio is 1 up to float32 noise at every step only if every weight sync reached vLLM.
    assert len(sync.series("actor/m2po/second_moment_all")) == steps
    assert max(sync.series("actor/m2po/second_moment_all")) < 1e-10
    assert sync.series("actor/m2po/masked_fraction") == [0.0] * steps
    assert sync.series("val-core/arithmetic/acc/mean@1"), "verl validated with the arithmetic reward"

    ours, ledger = run_mode(train, tmp_path / "ours", "stale_k", 0, *same, steps=steps)
    assert versions_by_step(ledger) == {step: {step - 1} for step in range(1, steps + 1)}
    assert_every_place_was_trained_once(ledger, steps)
    for exact in ("critic/score/mean", "response_length/mean", "prompt_length/mean"):
        assert ours.series(exact) == sync.series(exact)
    assert ours.series("actor/grad_norm") == pytest.approx(sync.series("actor/grad_norm"), rel=1e-3)
    assert ours.series("actor/loss") == pytest.approx(sync.series("actor/loss"), rel=1e-3, abs=1e-6)
    assert ours.series("val-core/arithmetic/acc/mean@1") == sync.series("val-core/arithmetic/acc/mean@1")


@pytest.mark.feature("validation while training", mode="stale_k_separate")
def test_every_trained_row_is_exactly_16_steps_old_on_devices_of_its_own(train, tmp_path):
    """That they are four or two steps old on shared devices: the run that is resumed below."""
    k_steps, steps, batch, responses = 16, 20, 2, 2
    overrides = (*SEPARATE, *TINY_BATCHES, "trainer.test_freq=20")
    result, ledger = run_mode(train, tmp_path, "stale_k_separate", k_steps * UPDATES_PER_STEP, *overrides, steps=steps)
    assert_exactly_k_steps_old(result, ledger, k_steps, steps)
    assert_every_place_was_trained_once(ledger, steps, batch, responses)
    assert result.series("staleness/prefetched")[1:] == [batch] * (steps - 1), "unpacked while the one before trained"
    assert result.series("val-core/arithmetic/acc/mean@1"), "it validated while rollouts were in flight"


@pytest.mark.feature("failed trajectories masked", mode="stale_k_separate")
def test_a_prompt_that_fails_is_replaced_by_the_same_weights_and_a_trajectory_masked(train, tmp_path):
    """A tenth fail in the reward function, which raises, returns NaN, infinity or None, or never ends.

    Of another tenth one trajectory fails: its group is trained, and there are as many rows as ever.
    """
    result, ledger = run_mode(
        train,
        tmp_path,
        "stale_k_separate",
        UPDATES_PER_STEP,
        *SEPARATE,
        f"reward.custom_reward_function.path={failing_rewards.__file__}",
        "trainer.v1.stale_k_separate.generation_timeout_s=20",
        "trainer.v1.stale_k_separate.on_failed_trajectory=mask",
    )
    assert_exactly_k_steps_old(result, ledger, 1, STEPS)
    assert_every_place_was_trained_once(ledger)
    assert not any(failing_rewards.fails(group[0]) for line in ledger for group in line["groups"])
    assert sum(result.series("staleness/evicted_failed")) >= 3
    assert "generation_timeout_s=20" in result.output and "ZeroDivisionError" in result.output
    masked = [
        group[0]
        for line in ledger
        for group in line["groups"]
        for _, spans in group[3]
        if not sum(tokens for _, tokens in spans)
    ]
    partly = [group[0] for line in ledger for group in line["groups"] if failing_rewards.fails_once(group[0])]
    assert masked == partly and len(masked) >= 3
    assert sum(result.series("staleness/masked_trajectories")) == len(masked)
    assert sum(result.series("staleness/trained_tokens")) == sum(
        tokens for line in ledger for _, tokens in spans_of(line)
    )
    assert all(math.isfinite(value) for value in result.series("actor/loss") + result.series("actor/grad_norm"))


@pytest.mark.timeout(1200)
def test_no_trained_token_is_older_than_the_bound_for_100_steps(train, tmp_path):
    """Responses of 8 tokens in the median and up to 192, 60 ms a token: the longest outlive a bound of one step."""
    steps, bound, environment = 100, 1, {SECONDS_PER_TOKEN: "0.06"}
    result, ledger = run_mode(
        train,
        tmp_path,
        "bounded_async",
        bound,
        *SEPARATE,
        *TINY_BATCHES,
        *paced(tmp_path, lengths=[Lengths(1, median=8, sigma=1.3, longest=192)]),
        "++trainer.v1.bounded_async.min_usable_share=0.5",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "data.max_response_length=192",
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.logits_processors=benchmarks.paced.token_time:TokenTime",
        steps=steps,
        environment=environment,
        timeout_s=900,
    )
    assert [line["step"] for line in ledger] == list(range(1, steps + 1))
    trained = masked = 0
    for line in ledger:
        oldest_kept = line["version"] - bound if line["oldest_version"] is None else line["oldest_version"]
        assert oldest_kept >= line["version"] - bound
        kept = [(version, tokens) for version, tokens in spans_of(line) if version >= oldest_kept]
        assert min(kept)[0] >= line["version"] - bound and max(kept)[0] <= line["version"]
        if line["oldest_version"] is None:
            assert kept == spans_of(line), "older tokens are there, and nobody was told to mask them"
        trained += sum(tokens for _, tokens in kept)
        masked += sum(tokens for _, tokens in spans_of(line)) - sum(tokens for _, tokens in kept)
    uids = [group[1] for line in ledger for group in line["groups"]]
    assert len(uids) == len(set(uids)) == steps * 2
    assert max(result.series("staleness/age_updates_max")) <= bound
    # The long tail was there: generations that crossed weight updates, tokens that were masked, and were counted, and
    # generations that were aborted, since less than half of their tokens could still have been trained on.
    assert any(len(row[1]) > 2 for line in ledger for group in line["groups"] for row in group[3])
    assert sum(result.series("staleness/over_age_tokens")) == masked > 0
    assert sum(result.series("staleness/trained_tokens")) == trained
    assert sum(result.series("staleness/evicted_aborted")) > 0


@pytest.mark.feature("a critic (`gae`)", mode="stale_k")
@pytest.mark.feature("a reference model, KL in the loss", mode="stale_k")
@pytest.mark.feature("`ppo_epochs=2`", mode="stale_k")
@pytest.mark.feature("KL in the reward", mode="stale_k")
@pytest.mark.feature("an entropy bonus", mode="stale_k")
@pytest.mark.feature("a journal", mode="stale_k")
@pytest.mark.feature("resuming from a checkpoint", mode="stale_k")
@pytest.mark.feature("asynchronous saving", mode="stale_k")
@pytest.mark.timeout(1500)  # two runs
def test_a_critic_a_reference_policy_and_two_epochs_go_on_where_a_checkpoint_and_the_journal_are(train, tmp_path, tiny):
    """GAE on stale rollouts, the KL to the reference in the loss and in the reward, four updates a step.

    Eight steps; then as if it had died before checkpoint 6. A run without a journal goes on in test_restarts.py.
    """
    checkpoints, updates_per_step, k_steps = Checkpoints(tmp_path / "saved"), 2 * UPDATES_PER_STEP, 2

    def run(*overrides: str):
        return run_mode(
            train,
            tmp_path / "run",
            "stale_k",
            k_steps * updates_per_step,
            "algorithm.adv_estimator=gae",
            f"critic.model.path={tiny}",
            "actor_rollout_ref.actor.use_kl_loss=true",
            "algorithm.use_kl_in_reward=true",
            "actor_rollout_ref.actor.entropy_coeff=0.01",
            "actor_rollout_ref.actor.ppo_epochs=2",
            "++trainer.v1.stale_k.journal=true",
            f"data.train_max_samples={4 * BATCH}",
            "trainer.total_epochs=2",
            "trainer.save_freq=2",
            "trainer.test_freq=4",
            "trainer.val_before_train=true",
            "trainer.resume_mode=auto",
            f"trainer.default_local_dir={checkpoints.root}",
            *overrides,
        )

    # verl leaves the pointer to whoever writes in the background; here nobody does, and it is written by us.
    first, whole = run("actor_rollout_ref.actor.checkpoint.async_save=true")
    assert (checkpoints.root / POINTER).read_text() == "8"
    assert_exactly_k_steps_old(first, whole, k_steps, STEPS, updates_per_step)
    assert_every_place_was_trained_once(whole)
    assert first.series("staleness/prefetched")[1:] == [BATCH] * (STEPS - 1), "unpacked while the one before trained"
    assert first.series("val-core/arithmetic/acc/mean@1"), "it validated while rollouts were in flight"
    for trained in ("critic/vf_loss", "critic/grad_norm", "actor/grad_norm"):
        values = first.series(trained)
        assert len(values) == STEPS and all(math.isfinite(value) and value > 0 for value in values), trained
    # The first update has the reference's own weights, every later one has left them.
    assert first.series("actor/kl_loss")[-1] > 0
    # The batches of the first three steps were generated by the reference's weights.
    penalties = first.series("actor/reward_kl_penalty")
    assert max(map(abs, penalties[: k_steps + 1])) < 1e-6 and penalties[k_steps + 1] != 0
    assert all(value > 0 for value in first.series("actor/entropy_loss"))

    assert checkpoints.steps() == [2, 4, 6, 8]
    assert all(flaws(checkpoints.folder(step)) == [] for step in checkpoints.steps())
    (checkpoints.root / POINTER).write_text("4")
    second, redone = run()
    assert read_ledger(tmp_path / "run" / "ledger.jsonl")[STEPS + 1] == {"resumed_from": 4}
    assert [line["groups"] for line in redone] == [line["groups"] for line in whole], "something was generated again"
    for same in ("actor/loss", "critic/vf_loss"):
        assert second.series(same) == pytest.approx(first.series(same)[4:], rel=1e-3, abs=1e-6)
    assert (tmp_path / "metrics.attempt-1.jsonl").exists(), "the first attempt's log was erased"
