"""Replay that no run can honour is refused before the start, by key and with what to do."""

import pytest
from omegaconf import OmegaConf

from verl_m2po.staleness import checks
from verl_m2po.staleness.checks import memory

KEY = "trainer.v1.replay.replay"


def config(mode: str, **changes):
    """What the preflight reads of a sound configuration, with changes of the mode `replay` given as `a__b=value`."""
    base = OmegaConf.create(
        {
            "data": {"train_batch_size": 256, "max_prompt_length": 512, "max_response_length": 1024},
            "algorithm": {},
            "actor_rollout_ref": {
                "hybrid_engine": False,
                "actor": {"ppo_mini_batch_size": 64, "ppo_epochs": 1},
                "rollout": {
                    **{"n": 8, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "agent": {}},
                    **{"nnodes": 1, "n_gpus_per_node": 4, "checkpoint_engine": {"backend": "nccl"}},
                },
            },
            "trainer": {"v1": {"trainer_mode": mode, "replay": {}, "sampler": {}}},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(base, f"trainer.v1.replay.{key.replace('__', '.')}", value, force_add=True)
    return base


def problems(mode: str = "replay", staleness_updates: int = 64, **replay):
    changes = {f"replay__{name}": value for name, value in replay.items()}
    return checks.check(config(mode, staleness_updates=staleness_updates, **changes))


@pytest.mark.parametrize(("uses", "share"), [(1, 1.0), (2, 0.5), (4, 0.25), (17, 1 / 16), (9, 0.25), (None, 0.25)])
def test_a_reuse_that_a_run_can_honour_has_no_problem(uses, share):
    found = problems(max_uses=uses, fresh_share=share)
    assert not any(problem.is_fatal for problem in found)
    assert [problem.key for problem in found] == ([f"{KEY}.max_uses"] if uses in (2, 4) else [])


def test_a_limit_of_uses_that_empties_the_window_is_mentioned():
    (problem,) = problems(max_uses=4, fresh_share=0.25)
    assert "used up after about 4 trainer steps" in problem.why and "null" in problem.remedy
    assert problems(max_uses=4, fresh_share=0.25, staleness_updates=16) == []


@pytest.mark.parametrize("replay", [{}, {"sampling": "positive", "baseline_groups": 10240, "ramp_steps": 200}])
def test_self_imitation_and_its_settings_go_together(replay):
    assert problems(max_uses=None, fresh_share=0.25, **replay) == []


@pytest.mark.parametrize(
    ("replay", "key", "says"),
    [
        ({"max_uses": 0}, "max_uses", "1"),
        ({"max_uses": 4, "fresh_share": 0.0}, "fresh_share", "share of the prompts"),
        ({"max_uses": 4, "fresh_share": 1.5}, "fresh_share", "share of the prompts"),
        ({"max_uses": 4, "fresh_share": 0.3}, "fresh_share", "Set it to 0.296875 or 0.30078125"),
        ({"max_uses": 300, "fresh_share": 0.001, "staleness_updates": 2000}, "fresh_share", "Set it to 0.00390625,"),
        (
            {"max_uses": 4, "fresh_share": 0.25, "sampling": "best"},
            "sampling",
            "Set it to uniform, newest, informative or",
        ),
        ({"max_uses": 4, "fresh_share": 0.125, "ramp_steps": 200}, "ramp_steps", "to positive"),
        ({"max_uses": 4, "fresh_share": 0.25, "baseline_groups": -1}, "baseline_groups", "too small"),
        ({"max_uses": None, "fresh_share": 1.0}, "max_uses", "leaves no place"),
        ({"max_uses": None, "fresh_share": 0.125, "staleness_updates": 16}, "fresh_share", "to 28 or more"),
        ({"max_uses": 4, "fresh_share": 1.0}, "max_uses", "leaves no place"),
        ({"max_uses": 1, "fresh_share": 0.5}, "fresh_share", "every prompt of a batch is new"),
        ({"max_uses": 4, "fresh_share": 0.25, "staleness_updates": 8}, "max_uses", "to 12 or more"),
        ({"max_uses": 2, "fresh_share": 0.5, "staleness_updates": 0}, "max_uses", "to 4 or more"),
    ],
)
def test_a_reuse_that_no_run_can_honour_is_refused_with_what_to_do(replay, key, says):
    (problem,) = problems(**replay)
    assert problem.is_fatal and problem.key == f"{KEY}.{key}" and says in str(problem)


def test_a_share_that_the_uses_cannot_keep_is_mentioned():
    (problem,) = problems(max_uses=2, fresh_share=0.25)
    assert not problem.is_fatal and "about 0.5 of the prompts will be new" in str(problem)


@pytest.mark.parametrize("mode", ["sync", "stale_k", "stale_k_separate"])
def test_replay_in_a_mode_that_trains_each_rollout_once_is_refused(mode):
    (problem,) = problems(mode, max_uses=4, fresh_share=0.25)
    assert problem.is_fatal and problem.key == f"{KEY}.max_uses" and "staleness=replay" in problem.remedy


def test_a_journal_goes_with_it():
    assert checks.check(config("replay", journal=True)) == []


REFERENCE = "trainer.v1.replay.reference"
DECOUPLED = {
    "algorithm.rollout_correction": {"bypass_mode": False, "rollout_is": "token"},
    "actor_rollout_ref.actor.use_kl_loss": True,
}
K2 = {"actor_rollout_ref.actor.kl_loss_type": "k2"}


@pytest.mark.parametrize(
    ("reference", "others", "key", "says"),
    [
        ({"least_base_share": 0.5}, DECOUPLED | K2, None, ""),
        ({"least_base_share": 0.5}, DECOUPLED | {"actor_rollout_ref.actor.kl_loss_type": "low_var_kl+"}, None, ""),
        ({"least_base_share": 0.5}, DECOUPLED | {"actor_rollout_ref.actor.kl_loss_type": "low_var_kl"}, "type", "k2"),
        ({"least_base_share": 0.5}, {}, "least_base_share", "use_kl_loss=true"),
        ({"least_base_share": 0.5}, K2 | {"actor_rollout_ref.actor.use_kl_loss": True}, "base_share", "loss=mix_ppg"),
        ({"least_base_share": 1.5}, DECOUPLED | K2, "least_base_share", "a share"),
        ({"fall_every_steps": 0}, {}, "fall_every_steps", "1"),
        ({"reincarnate_after_steps": 0}, {}, "reincarnate_after_steps", "1"),
        ({"reincarnate_after_steps": 100}, {}, None, ""),
        ({"reincarnate_after_steps": 100}, {"actor_rollout_ref.model.lora.rank": 8}, "after_steps", "merged weights"),
        ({"reincarnate_after_steps": 100}, {"actor_rollout_ref.actor.strategy": "megatron"}, "after_steps", "fsdp2"),
    ],
)
def test_a_reference_that_cannot_move_as_asked_is_refused_with_what_to_do(reference, others, key, says):
    asked = config("replay", reference=reference)
    for name, value in others.items():
        OmegaConf.update(asked, name, value, force_add=True)
    found = [problem for problem in checks.check(asked) if problem.is_fatal]
    assert [problem.key.endswith(str(key)) for problem in found] == ([] if key is None else [True])
    assert not found or says in str(found[0])


def test_a_reincarnation_after_the_end_is_mentioned():
    asked = config("replay", reference={"reincarnate_after_steps": 100})
    OmegaConf.update(asked, "trainer.total_training_steps", 100, force_add=True)
    (problem,) = checks.check(asked)
    assert not problem.is_fatal and problem.key == f"{REFERENCE}.reincarnate_after_steps"


@pytest.mark.parametrize(
    ("replay", "key"),
    [
        ({"max_uses": 4, "fresh_share": 0.25}, None),
        ({"max_uses": 2, "fresh_share": 0.25}, None),
        ({"max_uses": None, "fresh_share": 0.125}, None),
        ({"max_uses": 0}, "max_uses"),
        ({"max_uses": 99, "fresh_share": 0.25}, "max_uses"),
        ({"max_uses": 4, "fresh_share": 0.3}, "fresh_share"),
        ({"max_uses": None}, "max_uses"),
        ({"fresh_share": 0.5}, "fresh_share"),
    ],
)
def test_bounded_async_is_asked_the_same_but_for_the_mean_which_speeds_decide(replay, key):
    asked = config("bounded_async")
    OmegaConf.update(asked, "trainer.v1.bounded_async", {"staleness_updates": 16, "replay": replay})
    found = checks.check(asked)
    assert [problem.key for problem in found] == ([f"trainer.v1.bounded_async.replay.{key}"] if key else [])


@pytest.mark.parametrize(
    ("ahead_updates", "max_uses", "why"),
    [
        (None, None, None),
        (0, None, None),
        (64, None, None),
        (68, None, "would be too old: trainer.v1.bounded_async.staleness_updates=64"),
        (6, None, "Set it to 4 or 8"),
        (-4, None, "optimizer updates"),
        (4, 1, "without it trainer.v1.bounded_async.staleness_updates=64 says how far"),
    ],
)
def test_how_far_generation_runs_ahead_is_a_number_of_trainer_steps_within_the_window(ahead_updates, max_uses, why):
    asked = config("bounded_async")
    replay = {"max_uses": max_uses, "fresh_share": 1.0 if max_uses == 1 else 0.25}
    changes = {"staleness_updates": 64, "ahead_updates": ahead_updates, "replay": replay}
    OmegaConf.update(asked, "trainer.v1.bounded_async", changes)
    found = checks.check(asked)
    assert {problem.key for problem in found} == ({"trainer.v1.bounded_async.ahead_updates"} if why else set())
    assert why is None or why in str(found[0])


def test_what_is_kept_for_another_use_needs_memory_beside_what_waits():
    asked = config("bounded_async")
    OmegaConf.update(asked, "trainer.v1.bounded_async", {"staleness_updates": 16, "prefetch": False})
    once = memory.estimate_buffer_bytes(asked, 4)
    OmegaConf.update(asked, "trainer.v1.bounded_async.replay.max_uses", None)
    assert memory.estimate_buffer_bytes(asked, 4) == 2 * once
    assert memory.buffer_rows(asked, 4) == (4 + 2 + 5) * 256 * 9
    OmegaConf.update(asked, "trainer.v1.bounded_async.prefetch", True)
    unpacked = 256 * 8 * (1024 * 48 + 512 * 24 + memory.ROW_OVERHEAD_BYTES)
    assert memory.estimate_buffer_bytes(asked, 4) == 2 * once + unpacked
    assert memory.buffer_rows(asked, 4) == (4 + 3 + 5) * 256 * 9
    OmegaConf.update(asked, "trainer.v1.bounded_async.ahead_updates", 4)
    assert memory.buffer_rows(asked, 4) == (2 + 2 + 5) * 256 * 9, "one step ahead: two batches wait"
