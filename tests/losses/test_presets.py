"""Every preset of the group `loss` composes on verl's configs, and gives verl what it asks for."""

from importlib import resources

import pytest
from compose import composed
from hydra.utils import instantiate
from omegaconf import OmegaConf
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
from verl.utils.config import omega_conf_to_dataclass

import verl_m2po.advantages  # noqa: F401
from verl_m2po.losses.family.rec import MEMBERS
from verl_m2po.losses.kernel.registry import LOSSES

PRESETS = sorted(
    entry.name.removesuffix(".yaml")
    for entry in (resources.files("verl_m2po.config") / "loss").iterdir()
    if entry.name.endswith(".yaml")
)
# Presets of verl's own, by the factory in verl that says the same.
FACTORIES = {
    "tis": RolloutCorrectionConfig.decoupled_token_is(),
    "icepop": RolloutCorrectionConfig.decoupled_token_icepop(),
    "seq_mis": RolloutCorrectionConfig.decoupled_seq_is_rs(),
    "decoupled_ppo": RolloutCorrectionConfig.decoupled_token_is(threshold=100.0),
}


@pytest.fixture(scope="module")
def configs():
    return {name: composed(f"loss={name}") for name in PRESETS}


def actor_of(config):
    return instantiate(config.actor_rollout_ref.actor.policy_loss, _convert_="partial")


@pytest.mark.parametrize("name", PRESETS)
def test_it_composes_and_names_what_is_registered(configs, name):
    config = configs[name]
    assert actor_of(config).loss_mode == config.algorithm.policy_loss
    assert config.algorithm.policy_loss in POLICY_LOSS_REGISTRY
    assert config.algorithm.adv_estimator in ADV_ESTIMATOR_REGISTRY


@pytest.mark.parametrize("name", PRESETS)
def test_verl_can_build_its_actor_settings_from_it(configs, name):
    actor = configs[name].actor_rollout_ref.actor
    OmegaConf.resolve(actor)
    assert omega_conf_to_dataclass(actor).policy_loss.loss_mode == configs[name].algorithm.policy_loss


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_decoupled_presets_say_what_verls_factories_say(configs, name):
    correction = OmegaConf.to_container(configs[name].algorithm.rollout_correction)
    expected = {key: getattr(FACTORIES[name], key) for key in correction}
    assert correction == expected


def test_rapid_gives_verls_loss_its_settings(configs):
    correction = actor_of(configs["rapid"]).rollout_correction
    assert (correction.loss_type, correction.rollout_is, correction.rollout_is_threshold) == ("reinforce", "token", 2.0)


@pytest.mark.parametrize(
    ("preset", "member"),
    [
        ("rec", "rec_one_side_no_is"),
        ("rec_one_side_is", "rec_one_side_is"),
        ("rec_two_side_is", "rec_two_side_is"),
        ("rec_ring_no_is", "rec_ring_no_is"),
        ("rec_gspo_is", "rec_gspo_is"),
        ("rec_gspo_no_is", "rec_gspo_no_is"),
        ("reinforce", "reinforce"),
        ("opmd", "opmd"),
    ],
)
def test_presets_of_rec_are_its_named_members(configs, preset, member):
    values = vars(actor_of(configs[preset]).rec)
    expected = vars(MEMBERS[member])
    assert {k: v for k, v in values.items() if k != "_target_"} == {
        k: v for k, v in expected.items() if k != "_target_"
    }


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_record_names_the_options_that_select_its_loss(configs, name):
    selecting = {preset for preset in PRESETS if configs[preset].algorithm.policy_loss == name}
    assert set(LOSSES[name].presets) == selecting


def test_the_age_of_the_data_reaches_decoupled_loglinear():
    config = composed(
        "loss=decoupled_loglinear", "trainer.v1.trainer_mode=probe", "+trainer.v1.probe.staleness_updates=8"
    )
    assert actor_of(config).decoupled_loglinear.proximal_alpha() == 7 / 8


def test_a_setting_can_be_overridden_on_verls_own_config():
    config = composed(
        "algorithm.policy_loss=rec",
        "actor_rollout_ref.actor.policy_loss.rec.clip=ring",
        "actor_rollout_ref.actor.policy_loss.opsm.delta=0.1",
        "algorithm.asymre.baseline_shift=-0.2",
        config_name="ppo_trainer",
    )
    policy_loss = actor_of(config)
    assert (policy_loss.rec.clip, policy_loss.opsm.delta) == ("ring", 0.1)
