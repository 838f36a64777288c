"""Laws of our primary configs and groups: every choice composes, means what its file says, and is one verl accepts."""

import pytest
from composing import composed, option_values, options, own_values, primaries, select
from verl.utils.config import omega_conf_to_dataclass, validate_config

from verl_m2po.config.hydra import GROUPS, PRIMARY_CONFIGS

pytestmark = pytest.mark.slow

ALL_OPTIONS = [(group, option) for group in GROUPS for option in options(group)]
SEPARATE = [option for option in options("staleness") if option.endswith("_separate")] + [
    "bounded_async",
    "adaptive",
]
# verl's primary configs name no engine; a recipe does.
ENGINE = ("actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.actor.use_dynamic_bsz=true")


@pytest.fixture(autouse=True)
def a_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")


@pytest.mark.parametrize("primary", primaries())
def test_no_primary_config_undoes_a_choice_of_the_user(primary):
    """A primary config's own values come after those of the groups, so no key that an option sets may be among them."""
    own = own_values(primary)
    for group, option in ALL_OPTIONS:
        undone = own.keys() & option_values(group, option).keys()
        assert not undone, f"{primary}.yaml sets {undone}, which {group}={option} sets too"


@pytest.mark.parametrize(("group", "option"), ALL_OPTIONS)
def test_an_option_does_what_its_file_says(group, option):
    config = composed("m2po_trainer", f"{group}={option}")
    for key, expected in option_values(group, option).items():
        if "${" in str(expected):
            continue  # it says where its value comes from
        # YAML reads 3e-4 as a string, OmegaConf as a number.
        assert str(select(config, key)) == str(expected), key


# Settings that options of two groups set: the group that comes last, and so decides.
SHARED = {
    "algorithm.adv_estimator": "loss",
    "algorithm.rollout_correction.bypass_mode": "loss",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "hardware",
    # SPEAR's advantages are in the scale of the scores.
    "algorithm.norm_adv_by_std_in_grpo": "replay",
}


def test_options_of_different_groups_do_not_meet_where_it_is_not_meant():
    """So every combination is what its options say one by one, without composing all of them."""
    setters: dict[str, set[str]] = {}
    for group, option in ALL_OPTIONS:
        for key in option_values(group, option):
            setters.setdefault(key, set()).add(group)
    shared = {key: max(groups, key=GROUPS.index) for key, groups in setters.items() if len(groups) > 1}
    assert shared == SHARED


def test_where_they_meet_the_later_group_decides():
    config = composed("m2po_trainer", "task=arithmetic", "loss=oapl", "model=qwen2_5_32b", "hardware=one_gpu")
    assert (config.algorithm.adv_estimator, config.actor_rollout_ref.rollout.tensor_model_parallel_size) == ("oapl", 1)
    assert composed("m2po_trainer", "task=arithmetic", "loss=mix_ppg").algorithm.rollout_correction.bypass_mode is False


@pytest.mark.parametrize("primary", primaries())
@pytest.mark.parametrize("staleness", ["on_policy", "s256", "s256_separate", "bounded_async", "adaptive"])
def test_verl_accepts_every_recipe_at_every_kind_of_staleness(primary, staleness):
    hardware = "eight_gpu_separate" if staleness in SEPARATE else "eight_gpu"
    config = composed(primary, f"staleness={staleness}", f"hardware={hardware}", "model=tiny", "task=gsm8k")
    validate_config(config, use_reference_policy=False, use_critic=False)


@pytest.mark.parametrize("staleness", SEPARATE)
def test_separate_modes_have_devices_of_their_own(staleness):
    config = composed("m2po_trainer", f"staleness={staleness}", "hardware=eight_gpu_separate")
    rollout = config.actor_rollout_ref.rollout
    assert config.actor_rollout_ref.hybrid_engine is False
    assert rollout.nnodes * rollout.n_gpus_per_node + config.trainer.nnodes * config.trainer.n_gpus_per_node == 8
    assert rollout.checkpoint_engine.backend == "nccl"


@pytest.mark.parametrize("loss", options("loss"))
def test_a_loss_reaches_the_actor(loss):
    actor = omega_conf_to_dataclass(composed("m2po_trainer", f"loss={loss}").actor_rollout_ref.actor)
    assert actor.policy_loss.loss_mode == option_values("loss", loss).get("algorithm.policy_loss", "vanilla")


@pytest.mark.parametrize("primary", PRIMARY_CONFIGS)
def test_a_loss_reaches_the_actor_of_every_primary_config_of_verl(primary):
    actor = omega_conf_to_dataclass(composed(primary, "loss=m2po", *ENGINE).actor_rollout_ref.actor)
    assert actor.policy_loss.loss_mode == "m2po"


@pytest.mark.parametrize("group", ["loss", "staleness"])
def test_runs_of_a_sweep_have_different_names(group):
    """verl's loggers name their files after the experiment: two runs with one name overwrite each other."""
    names = [composed("m2po_trainer", f"{group}={option}").trainer.experiment_name for option in options(group)]
    assert len(set(names)) == len(names), names


def test_a_bound_that_moves_and_a_fixed_one_of_its_size_have_different_names():
    fixed, moving = (
        composed("m2po_trainer", f"staleness={staleness}", f"trainer.v1.bounded_async.{key}=64").trainer.experiment_name
        for staleness, key in (("bounded_async", "staleness_updates"), ("adaptive", "adaptive.max_staleness_updates"))
    )
    assert (fixed, moving) == ("m2po_bounded_async_s64", "m2po_bounded_async_s64_adaptive")


@pytest.mark.parametrize("hardware", options("hardware"))
def test_weights_travel_by_what_the_hardware_has(hardware):
    config = composed("m2po_trainer", f"hardware={hardware}")
    backend = "gloo" if config.trainer.device == "cpu" else "nccl"
    assert config.actor_rollout_ref.rollout.checkpoint_engine.backend == backend
