"""Replay on real Ray, TransferQueue, FSDP and vLLM: rollouts are trained again, in their window."""

import pytest
from mode_runs import BATCH, LORA, SEPARATE, paced, run_mode, spans_of

from benchmarks.paced import SECONDS_PER_TOKEN
from benchmarks.paced.agent_loop import Lengths
from verl_m2po.staleness.restart.checkpoint import POINTER

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

STEPS = 5


@pytest.mark.feature("LoRA", mode="replay")
@pytest.mark.feature("KL in the reward", mode="replay")
@pytest.mark.feature("an entropy bonus", mode="replay")
@pytest.mark.feature("`ppo_epochs=2`", mode="replay")
@pytest.mark.feature("validation while training", mode="replay")
@pytest.mark.workload
def test_part_of_each_batch_is_generated_and_the_rest_are_earlier_successes(train):
    """Adapters, two epochs: four updates a step and a window of eight; a rollout may be trained for two more steps."""
    window_updates = 8
    run = train(
        *("loss=m2po", "staleness=replay", "replay=self_imitation"),
        f"trainer.v1.replay.staleness_updates={window_updates}",
        *LORA,
        *("algorithm.use_kl_in_reward=true", "actor_rollout_ref.actor.entropy_coeff=0.01"),
        *("actor_rollout_ref.actor.ppo_epochs=2", f"trainer.test_freq={STEPS}"),
        *(f"trainer.total_training_steps={STEPS}", "trainer.save_freq=-1"),
    )
    replayed, admitted = run.series("staleness/replayed"), run.series("staleness/admitted")
    # The first batch is new as a whole; later ones as far as there are too few successes.
    assert replayed[0] == 0 and 0 < max(replayed) <= BATCH / 2
    assert sum(admitted) == sum(BATCH - again for again in replayed)
    assert run.series("staleness/age_updates_max")[0] == 0
    assert 0 < max(run.series("staleness/age_updates_max")) <= window_updates
    penalty = run.series("actor/reward_kl_penalty")
    assert abs(penalty[0]) < 5e-3 and abs(penalty[-1]) > 0 and len(penalty) == STEPS
    assert all(value > 0 for value in run.series("actor/entropy_loss"))
    assert run.series("val-core/arithmetic/acc/mean@1")


def test_on_separate_devices_no_group_is_twice_in_a_batch_nor_older_than_its_window(train, tmp_path):
    """Two groups are generated at a time, 48 tokens of 0.1 s each: a batch takes 20 s, a trainer step far less.

    How much is trained again hangs on how long the pushes take, during which generation goes on; it may be nothing.
    """
    result, ledger = run_mode(
        train,
        tmp_path,
        "bounded_async",
        8,
        *(*SEPARATE, "loss=m2po", "replay=x4", "actor_rollout_ref.rollout.max_num_seqs=8"),
        *paced(tmp_path, lengths=[Lengths(1, median=48)]),
        "data.max_response_length=48",
        # Two waits for busy servers, in which generation would catch up.
        "trainer.v1.bounded_async.served_within_nats=null",
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.logits_processors=benchmarks.paced.token_time:TokenTime",
        steps=STEPS,
        environment={SECONDS_PER_TOKEN: "0.1"},
    )
    # 80 requests at a time to a server that decodes eight: they are handed back, and not waited for.
    assert "Submission gate barrier timed out" not in result.output
    assert all(line["version"] - 4 <= version <= line["version"] for line in ledger for version, _ in spans_of(line))
    assert all(all(line["generated"]) for line in ledger), "when a group was generated is known at each of its uses"
    trained: set[str] = set()
    for step, replayed in enumerate(result.series("staleness/replayed"), start=1):
        uids = [group[1] for line in ledger if line["step"] == step for group in line["groups"]]
        assert len(uids) == len(set(uids)) == BATCH, "a group is twice in a batch"
        assert len(trained.intersection(uids)) == replayed <= BATCH * 3 / 4
        trained.update(uids)
    assert len(trained) + sum(result.series("staleness/replayed")) == STEPS * BATCH


@pytest.mark.feature("dynamic sampling", mode="replay")
@pytest.mark.feature("a journal", mode="replay")
@pytest.mark.feature("a reference model, KL in the loss", mode="replay")
@pytest.mark.feature("resuming from a checkpoint", mode="replay")
@pytest.mark.workload
@pytest.mark.timeout(1500)  # two runs
def test_remix_moves_its_reference_and_begins_anew_and_goes_on_from_there_after_a_crash(train, tmp_path):
    """Two updates a step and a window of four; the share falls from the second step on, step 4 begins anew.

    Then as if it had died in step 5, after the reference was moved and what step 5 trains was generated.
    """
    folder = tmp_path / "checkpoints"
    reference = "trainer.v1.replay.reference"

    def run():
        return run_mode(
            train,
            tmp_path,
            "replay",
            4,
            *("loss=mix_ppg", "staleness=replay", "replay=remix_whole"),
            *("actor_rollout_ref.actor.use_kl_loss=true", "trainer.v1.replay.journal=true"),
            *("algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=acc"),
            *(f"{reference}.constant_steps=1", f"{reference}.fall_every_steps=1"),
            f"{reference}.reincarnate_after_steps=3",
            *("trainer.save_freq=4", "trainer.resume_mode=auto", f"trainer.default_local_dir={folder}"),
            steps=STEPS,
        )

    first, whole = run()
    assert sum(first.series("staleness/evicted_uninformative")) > 0, (
        "groups without advantage are replaced in this mode too"
    )
    assert [path.name for path in (folder / "journal").glob("*.rows")]
    assert first.series("actor/kl_base_share") == pytest.approx([1, 0.9, 0.8, 1, 1])
    replayed = first.series("staleness/replayed")
    assert replayed[0] == 0 < min(replayed[1:3]) and replayed[3:] == [0, 0]
    # What is trained again is unpacked while the new rollouts are generated.
    assert all(ahead >= again for ahead, again in zip(first.series("staleness/prefetched"), replayed, strict=True))
    kl = first.series("actor/kl_loss")
    assert kl[3] < kl[2], "the reference is the policy that the step began with"
    assert [path.name for path in (folder / "reincarnated").iterdir()] == ["rank_0_of_1.safetensors"]

    (folder / POINTER).write_text("4")
    second, redone = run()
    assert [line["groups"] for line in redone] == [line["groups"] for line in whole], "something was generated again"
    # The reference is what it was: to the base model the KL is another one.
    for same in ("actor/loss", "actor/kl_loss", "actor/kl_base_share"):
        assert second.series(same) == pytest.approx(first.series(same)[4:], rel=1e-3, abs=1e-7)
