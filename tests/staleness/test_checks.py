"""Settings that contradict the staleness are found before anything starts, by name and with a remedy."""

import pytest
from omegaconf import OmegaConf

from verl_m2po.staleness import checks
from verl_m2po.staleness.checks import memory
from verl_m2po.staleness.config import MODE_DEFAULTS, SEPARATE_MODES, load_mode_config
from verl_m2po.staleness.rule.units import UpdateClock

MODES = list(MODE_DEFAULTS)
FILTER_KEY = "algorithm.filter_groups"
FILTER = {"algorithm__filter_groups__enable": True, "algorithm__filter_groups__metric": "reward"}


def config(mode: str = "stale_k", **changes):
    """What the preflight reads of a sound configuration, with changes given as `a__b=value`."""
    base = OmegaConf.create(
        {
            "data": {"train_batch_size": 256, "max_prompt_length": 512, "max_response_length": 1024},
            "algorithm": {},
            "actor_rollout_ref": {
                "actor": {"ppo_mini_batch_size": 64, "ppo_epochs": 1},
                "rollout": {"n": 8, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "agent": {}},
            },
            "trainer": {"v1": {"trainer_mode": mode, mode: {}, "sampler": {}}},
        }
    )
    if mode in SEPARATE_MODES:
        devices = {"nnodes": 1, "n_gpus_per_node": 4, "checkpoint_engine": {"backend": "nccl"}}
        base = OmegaConf.merge(base, {"actor_rollout_ref": {"hybrid_engine": False, "rollout": devices}})
    for key, value in changes.items():
        OmegaConf.update(base, key.replace("__", "."), value, force_add=True)
    return base


@pytest.mark.parametrize("mode", MODES)
def test_a_sound_configuration_has_no_problem(mode):
    assert checks.check(config(mode, **{f"trainer__v1__{mode}__staleness_updates": 256})) == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"trainer__v1__stale_k__staleness_updates": 10}, "trainer.v1.stale_k.staleness_updates"),
        ({"trainer__v1__stale_k__staleness_updates": -4}, "trainer.v1.stale_k.staleness_updates"),
        ({"trainer__v1__stale_k__max_failed_fraction": 1.5}, "trainer.v1.stale_k.max_failed_fraction"),
        ({"trainer__v1__stale_k__failed_window_groups": 0}, "trainer.v1.stale_k.failed_window_groups"),
        ({"trainer__v1__stale_k__generation_timeout_s": 0}, "trainer.v1.stale_k.generation_timeout_s"),
        ({"trainer__v1__stale_k__on_failed_trajectory": "drop"}, "trainer.v1.stale_k.on_failed_trajectory"),
        ({"trainer__v1__stale_k__on_failed_trajectory": None}, "trainer.v1.stale_k.on_failed_trajectory"),
        ({"trainer__v1__stale_k__stop_wait_s": -1}, "trainer.v1.stale_k.stop_wait_s"),
        ({"trainer__v1__stale_k__parameter_sync_step": 4}, "trainer.v1.stale_k.parameter_sync_step"),
        ({"trainer__v1__stale_k__no_such_key": 1}, "trainer.v1.stale_k.no_such_key"),
        ({"trainer__v1__stale_k__staleness_updates": "many"}, "trainer.v1.stale_k.staleness_updates"),
        ({"actor_rollout_ref__actor__ppo_mini_batch_size": 100}, "trainer.v1.stale_k.staleness_updates"),
        ({"actor_rollout_ref__rollout__top_p": 0.9}, "actor_rollout_ref.rollout.top_p"),
        ({"actor_rollout_ref__rollout__top_k": 50}, "actor_rollout_ref.rollout.top_k"),
        ({"actor_rollout_ref__rollout__temperature": 0}, "actor_rollout_ref.rollout.temperature"),
        ({"trainer__use_v1": False}, "trainer.use_v1"),
        ({**FILTER, "actor_rollout_ref__rollout__n": 1}, "algorithm.filter_groups.enable"),
        ({**FILTER, "reward__reward_model__enable": True}, "algorithm.filter_groups.enable"),
        ({**FILTER, "algorithm__filter_groups__metric": ""}, "algorithm.filter_groups.metric"),
        ({**FILTER, "algorithm__filter_groups__metric": None}, "algorithm.filter_groups.metric"),
        ({**FILTER, "algorithm__filter_groups__max_num_gen_batches": 1.5}, f"{FILTER_KEY}.max_num_gen_batches"),
        ({**FILTER, "algorithm__filter_groups__max_inflight_gen_batches": 0}, f"{FILTER_KEY}.max_inflight_gen_batches"),
        ({"skip__rollout_tq__enable": True}, "skip.rollout_tq.enable"),
        (
            {
                "actor_rollout_ref__actor__checkpoint__async_save": True,
                "actor_rollout_ref__actor__strategy": "megatron",
            },
            "actor_rollout_ref.actor.checkpoint.async_save",
        ),
        (
            {"critic__checkpoint__async_save": True, "critic__strategy": "megatron"},
            "critic.checkpoint.async_save",
        ),
        ({"trainer__v1__sampler__custom_sampler__path": "x.py"}, "trainer.v1.sampler.custom_sampler.path"),
        (
            {"actor_rollout_ref__rollout__agent__agent_loop_manager_class": "mine.Manager"},
            "actor_rollout_ref.rollout.agent.agent_loop_manager_class",
        ),
    ],
)
def test_each_contradiction_is_named(changes, key):
    problems = checks.check(config(**changes))
    assert [problem.key for problem in problems if problem.is_fatal] == [key]
    assert problems[0].remedy


@pytest.mark.parametrize("mode", MODES)
def test_engines_that_save_at_once_may_be_asked_to_save_asynchronously(mode):
    asked = {"actor_rollout_ref__actor__checkpoint__async_save": True, "actor_rollout_ref__actor__strategy": "fsdp2"}
    assert checks.check(config(mode, **asked)) == []


@pytest.mark.parametrize("mode", SEPARATE_MODES)
@pytest.mark.parametrize("seconds", [0, -1, "soon"])
def test_a_time_for_replacements_that_is_none_is_refused(mode, seconds):
    key = f"trainer.v1.{mode}.replica_timeout_s"
    (problem,) = checks.check(config(mode, **{key.replace(".", "__"): seconds}))
    assert problem.key == key and problem.value == seconds and problem.is_fatal
    assert checks.check(config(mode, **{key.replace(".", "__"): None})) == [], "null tries for ever"


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in SEPARATE_MODES])
@pytest.mark.parametrize(
    ("key", "value"),
    [("heal", True), ("replica_timeout_s", 60), ("max_replicas", 4), ("keep_pushed_weights", True)],
)
def test_a_shared_mode_that_is_to_heal_its_servers_is_refused_with_the_reason(mode, key, value):
    (problem,) = checks.check(config(mode, **{f"trainer__v1__{mode}__{key}": value}))
    assert problem.key == f"trainer.v1.{mode}.{key}" and problem.is_fatal
    assert "cannot be replaced alone" in problem.why and f"trainer.v1.{mode}.restarts" in problem.remedy


@pytest.mark.parametrize("mode", SEPARATE_MODES)
@pytest.mark.parametrize(
    ("key", "value"), [("checkpoint_engine__backend", "delta_sharded"), ("disaggregation__enabled", True)]
)
def test_servers_that_cannot_be_replaced_are_a_warning(mode, key, value):
    impossible = {f"actor_rollout_ref__rollout__{key}": value}
    (problem,) = checks.check(config(mode, **impossible))
    assert problem.key == f"trainer.v1.{mode}.heal" and not problem.is_fatal and "restarts" in problem.remedy
    assert checks.check(config(mode, **impossible, **{f"trainer__v1__{mode}__heal": False})) == []


STARTS_WITH_TWO = {
    "actor_rollout_ref__rollout__nnodes": 2,
    "actor_rollout_ref__rollout__n_gpus_per_node": 2,
    "actor_rollout_ref__rollout__tensor_model_parallel_size": 2,
}


@pytest.mark.parametrize("mode", SEPARATE_MODES)
@pytest.mark.parametrize(("most", "says"), [(1, "starts with 2"), (0, "at least 1"), (-1, "at least 1")])
def test_fewer_servers_than_the_run_starts_with_are_refused(mode, most, says):
    (problem,) = checks.check(config(mode, **STARTS_WITH_TWO, **{f"trainer__v1__{mode}__max_replicas": most}))
    assert problem.key == f"trainer.v1.{mode}.max_replicas" and problem.value == most and problem.is_fatal
    assert says in f"{problem.why} {problem.remedy}"


@pytest.mark.parametrize("mode", SEPARATE_MODES)
@pytest.mark.parametrize("most", [2, 3, None])
def test_as_many_servers_as_the_run_starts_with_or_more_may_serve(mode, most):
    assert checks.check(config(mode, **STARTS_WITH_TWO, **{f"trainer__v1__{mode}__max_replicas": most})) == []


@pytest.mark.parametrize("mode", SEPARATE_MODES)
@pytest.mark.parametrize(
    "impossible",
    [{"trainer__v1__{mode}__heal": False}, {"actor_rollout_ref__rollout__checkpoint_engine__backend": "delta_sharded"}],
    ids=["heal=false", "delta_sharded"],
)
def test_no_server_can_join_where_none_can_be_replaced(mode, impossible):
    changes = {key.format(mode=mode): value for key, value in impossible.items()}
    problems = checks.check(config(mode, **changes, **{f"trainer__v1__{mode}__max_replicas": 8}))
    (problem,) = [problem for problem in problems if problem.is_fatal]
    assert problem.key == f"trainer.v1.{mode}.max_replicas" and "no server can join" in problem.why


@pytest.mark.parametrize("mode", MODES)
def test_validation_may_truncate_what_it_samples_from(mode):
    """Its responses are not trained."""
    key = "actor_rollout_ref__rollout__val_kwargs"
    assert checks.check(config(mode, **{f"{key}__top_p": 0.7, f"{key}__top_k": 50})) == []


@pytest.mark.parametrize("mode", MODES)
def test_dynamic_sampling_goes_with_every_mode(mode):
    assert checks.check(config(mode, **FILTER)) == []


@pytest.mark.parametrize(("value", "is_refused"), [(1, False), (4, False), (2, True)])
def test_a_sync_step_that_contradicts_the_batch_sizes_is_refused(value, is_refused):
    """Four mini-batches a step: 4 says the same, 1 is the default."""
    changes = {"trainer__v1__bounded_async__parameter_sync_step": value}
    keys = [problem.key for problem in checks.check(config("bounded_async", **changes))]
    assert keys == ["trainer.v1.bounded_async.parameter_sync_step"] * is_refused


@pytest.mark.parametrize("mode", SEPARATE_MODES)
@pytest.mark.parametrize(
    ("key", "value", "is_fatal"),
    [
        ("rollout__nnodes", 0, True),
        ("rollout__n_gpus_per_node", 0, True),
        ("rollout__checkpoint_engine__backend", "naive", True),
        ("hybrid_engine", True, False),
    ],
)
def test_a_separate_mode_without_devices_of_its_own_is_refused(mode, key, value, is_fatal):
    changed = f"actor_rollout_ref__{key}"
    (problem,) = checks.check(config(mode, **{changed: value}))
    assert (problem.key, problem.value, problem.is_fatal) == (changed.replace("__", "."), value, is_fatal)
    assert checks.check(config("stale_k", **{changed: value})) == []


@pytest.mark.parametrize(
    ("mode", "changes", "named"),
    [
        ("stale_k", {}, "share their devices"),
        ("replay", {}, "share their devices"),
        ("bounded_async", {}, "hybrid_engine"),
        ("stale_k_separate", {"actor_rollout_ref__rollout__disaggregation__enabled": True}, "disaggregation"),
    ],
)
def test_devices_that_cannot_be_lent_are_refused(mode, changes, named):
    """verl itself ignores the key there, or ends the run when all has started."""
    key = "trainer.v1.separate_async.hybrid_rollout.enable_switch"
    lent = {key.replace(".", "__"): True, "actor_rollout_ref__hybrid_engine": mode != "bounded_async"}
    problems = [problem for problem in checks.check(config(mode, **lent, **changes)) if problem.key == key]
    assert [named in problem.why for problem in problems] == [True]


@pytest.mark.parametrize("mode", SEPARATE_MODES)
def test_devices_that_can_be_lent_may_have_a_rollout_of_their_own(mode):
    key = "trainer__v1__separate_async__hybrid_rollout__enable_switch"
    assert checks.check(config(mode, actor_rollout_ref__hybrid_engine=True, **{key: True})) == []


def test_more_rollouts_than_transfer_queue_may_hold_are_refused_before_the_ramp():
    """Stale-256 of the paper: 67 batches of 256 prompts and 2,048 responses; verl's limit is 100,000 entries."""
    changes = {
        "trainer__v1__stale_k__staleness_updates": 256,
        "transfer_queue__backend__SimpleStorage__total_storage_size": 100_000,
    }
    (problem,) = checks.check(config(**changes))
    assert problem.key == "transfer_queue.backend.SimpleStorage.total_storage_size"
    assert f"{67 * 256 * 9} entries" in problem.why
    for enough in (None, 67 * 256 * 9):
        changes["transfer_queue__backend__SimpleStorage__total_storage_size"] = enough
        assert checks.check(config(**changes)) == []


@pytest.mark.parametrize(
    ("save_freq", "total_steps", "replayed"), [(20, 500, 20), (-1, 500, 500), (-1, None, 0), (0, 7, 7)]
)
def test_with_a_journal_a_restart_needs_room_for_the_steps_since_the_checkpoint(save_freq, total_steps, replayed):
    """Of the memory only what checkpoints bound: nobody is refused for a crash at the end of a run that writes none."""
    changes = {
        "trainer__v1__stale_k__staleness_updates": 8,
        "trainer__v1__stale_k__prefetch": False,
        "trainer__save_freq": save_freq,
        "trainer__total_training_steps": total_steps,
    }
    without, with_journal = config(**changes), config(**changes, trainer__v1__stale_k__journal=True)
    assert memory.buffer_rows(without, 2) == 4 * 256 * 9
    assert memory.buffer_rows(with_journal, 2) == (4 + replayed) * 256 * 9
    batch_bytes = memory.estimate_buffer_bytes(without, 2) / 3
    assert memory.estimate_buffer_bytes(with_journal, 2) == batch_bytes * (3 + max(0, save_freq))
    OmegaConf.update(with_journal, "transfer_queue.backend.SimpleStorage.total_storage_size", 1, force_add=True)
    (problem,) = checks.check(with_journal)
    assert (f"after a crash up to {replayed} more from the journal" in problem.why) == (replayed > 0)
    too_little = 2 * memory.estimate_buffer_bytes(with_journal, 2) - 2
    (problem, _) = checks.check(with_journal, available_memory_bytes=too_little)
    assert ("trainer.save_freq" in problem.remedy) == (save_freq > 0)


def test_temperature_and_raw_log_probs_do_not_match():
    changes = {
        "actor_rollout_ref__rollout__temperature": 0.6,
        "actor_rollout_ref__rollout__logprobs_mode": "raw_logprobs",
    }
    assert [problem.key for problem in checks.check(config(**changes))] == ["actor_rollout_ref.rollout.logprobs_mode"]
    changes["actor_rollout_ref__rollout__logprobs_mode"] = "processed_logprobs"
    assert checks.check(config(**changes)) == []


def test_several_epochs_are_counted_and_mentioned():
    changes = {"actor_rollout_ref__actor__ppo_epochs": 2, "trainer__v1__stale_k__staleness_updates": 8}
    (problem,) = checks.check(config(**changes))
    assert problem.key == "actor_rollout_ref.actor.ppo_epochs" and not problem.is_fatal


@pytest.mark.parametrize("mode", MODES)
def test_masking_is_refused_where_a_copy_would_count_as_more_than_it_is(mode):
    key, mask = f"trainer.v1.{mode}.on_failed_trajectory", {f"trainer__v1__{mode}__on_failed_trajectory": "mask"}
    assert checks.check(config(mode, **mask)) == []
    for changes in ({"algorithm__adv_estimator": "max_at_k"}, {"algorithm__use_kl_in_reward": True}):
        (problem,) = checks.check(config(mode, **mask, **changes))
        assert problem.key == key and problem.is_fatal and "Set it to refill" in str(problem)
        assert checks.check(config(mode, **changes)) == []
    (problem,) = checks.check(config(mode, **mask, actor_rollout_ref__rollout__n=1))
    assert problem.key == key and not problem.is_fatal


def test_another_answer_to_a_failed_trajectory_is_refused_with_those_that_there_are():
    (problem,) = checks.check(config(trainer__v1__stale_k__on_failed_trajectory="Mask"))
    assert str(problem).startswith("trainer.v1.stale_k.on_failed_trajectory=Mask: there is no such choice")
    assert "refill or mask" in str(problem)


def test_an_unknown_key_error_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no_such_key.*The settings are: staleness_updates"):
        load_mode_config(config(trainer__v1__stale_k__no_such_key=1), "stale_k")


def test_memory_is_computed_from_the_depth():
    """Stale-256 of the paper: 65 batches x 256 prompts x 8 responses of 1024 tokens at 9 bytes, prompts at 4.

    The next one is unpacked: 48 and 24 bytes.
    """
    changes = {"trainer__v1__stale_k__staleness_updates": 256}
    expected = 65 * 256 * 8 * (1024 * 9 + 512 * 4 + memory.ROW_OVERHEAD_BYTES)
    expected += 256 * 8 * (1024 * 48 + 512 * 24 + memory.ROW_OVERHEAD_BYTES)
    assert memory.estimate_buffer_bytes(config(**changes), 64) == expected
    assert checks.check(config(**changes), available_memory_bytes=2 * expected) == []
    (problem,) = checks.check(config(**changes), available_memory_bytes=2 * expected - 2)
    assert problem.is_fatal and "ssd_offload" in problem.remedy and "65 batches" in problem.why
    changes["trainer__v1__stale_k__buffer_memory_limit_gib"] = expected / 2**30
    assert checks.check(config(**changes), available_memory_bytes=1) == []
    changes["trainer__v1__stale_k__buffer_memory_limit_gib"] = 0.1
    changes["transfer_queue__backend__SimpleStorage__ssd_offload__enabled"] = True
    assert checks.check(config(**changes), available_memory_bytes=1) == []


def test_a_run_shorter_than_its_staleness_is_refused():
    clock = UpdateClock(256, 64)
    assert checks.run_length.check_run_length(9, clock, "stale_k", 10) == []
    (problem,) = checks.run_length.check_run_length(10, clock, "stale_k", 10)
    assert problem.value == 40 and "at most 36" in problem.remedy
    assert checks.run_length.check_run_length(0, clock, "stale_k", 0) == []


@pytest.mark.parametrize(
    ("steps", "changes", "key", "most"),
    [
        (9, {}, None, None),
        (8, {}, "ahead_updates", 28),
        (9, {"ahead_updates": 64}, "ahead_updates", 32),
        (9, {"replay": {"max_uses": 1}}, "staleness_updates", 32),
    ],
)
def test_where_rollouts_are_trained_again_the_window_may_be_longer_than_the_run(steps, changes, key, most):
    section = {"staleness_updates": 256, "replay": {"max_uses": None, "fresh_share": 0.25}, **changes}
    found = checks.check(
        config("bounded_async", trainer__v1__bounded_async=section, trainer__total_training_steps=steps)
    )
    assert [problem.key for problem in found] == ([] if key is None else [f"trainer.v1.bounded_async.{key}"])
    assert all("before it trains on a rollout of its own weights" in problem.why for problem in found)
    assert all(f"at most {most}," in problem.remedy for problem in found)


@pytest.mark.parametrize(
    ("reference", "setting"),
    [
        ({"least_base_share": 0.5, "reincarnate_after_steps": 100}, "least_base_share"),
        ({"least_base_share": 1.0, "reincarnate_after_steps": 100}, "reincarnate_after_steps"),
        ({"least_base_share": 1.0}, None),
    ],
)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "replay"])
def test_a_reference_that_moves_is_refused_in_a_mode_whose_reference_stays(mode, reference, setting):
    found = checks.check(config(mode, trainer__v1__replay__reference=reference))
    assert [problem.key for problem in found] == ([] if setting is None else [f"trainer.v1.replay.reference.{setting}"])
    assert all(problem.is_fatal and f"trainer_mode={mode}" in problem.why for problem in found)


@pytest.mark.parametrize("mode", MODES)
def test_the_modes_set_what_they_need(mode):
    from verl_m2po.staleness.needs import set_what_the_mode_needs

    changed = config(mode)
    OmegaConf.set_struct(changed, True)
    set_what_the_mode_needs(changed)
    assert changed.algorithm.rollout_correction.bypass_mode is True
    assert changed.actor_rollout_ref.rollout.calculate_log_probs is True
    assert changed.actor_rollout_ref.rollout.agent.agent_loop_manager_class.startswith("verl_m2po.")
    mini_batches = 4 if mode in SEPARATE_MODES else 1
    assert changed.trainer.v1[mode].parameter_sync_step == mini_batches
    assert set(changed.trainer.v1[mode]) == set(MODE_DEFAULTS[mode])
    assert checks.check(changed) == []


@pytest.mark.parametrize(
    ("correction", "bypass"),
    [
        ({"bypass_mode": False}, True),
        ({"bypass_mode": True, "rollout_is": "token"}, True),
        # Weights proximal over behaviour policy carry the age: the proximal policy stays.
        ({"bypass_mode": False, "rollout_is": "token"}, False),
        ({"bypass_mode": False, "rollout_rs": "seq_sum_k1"}, False),
    ],
)
def test_a_proximal_policy_stays_only_where_weights_carry_the_age(correction, bypass):
    from verl_m2po.staleness.needs import set_what_the_mode_needs

    changed = config(algorithm__rollout_correction=correction)
    set_what_the_mode_needs(changed)
    assert changed.algorithm.rollout_correction.bypass_mode == bypass
