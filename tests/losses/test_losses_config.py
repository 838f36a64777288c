"""Settings of the losses: what is refused, and what `algorithm.policy_loss` overrules."""

import logging
import math

import pytest
from hydra.utils import instantiate

from verl_m2po.losses.config import M2POPolicyLossConfig


@pytest.mark.parametrize("threshold", [0, -0.04, math.nan, "small", None, True])
@pytest.mark.parametrize("loss", ["m2po", "m2po_clip"])
def test_impossible_threshold_is_refused_by_its_full_name(loss, threshold):
    key = rf"actor_rollout_ref\.actor\.policy_loss\.{loss}\.threshold"
    with pytest.raises((ValueError, TypeError), match=key):
        M2POPolicyLossConfig(**{loss: {"threshold": threshold}})


def test_unknown_loss_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"algorithm\.policy_loss=m2p0 .*Did you mean 'm2po'\?.*vanilla"):
        M2POPolicyLossConfig(selected="m2p0")


def test_unknown_scope_is_refused():
    with pytest.raises(ValueError, match=r"m2po\.scope must be one of mini_batch, micro_batch, got 'batch'"):
        M2POPolicyLossConfig(m2po={"scope": "batch"})


def test_mismatch_floor_needs_the_mini_batch():
    with pytest.raises(ValueError, match="subtract_mismatch_floor=true needs"):
        M2POPolicyLossConfig(m2po={"scope": "micro_batch", "subtract_mismatch_floor": True})


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("oapl.unit_gradient", {"oapl": {"unit_gradient": "no"}}),
        ("m2po.subtract_mismatch_floor", {"m2po": {"subtract_mismatch_floor": "off"}}),
        ("diagnostics", {"diagnostics": "no"}),
    ],
)
def test_a_text_is_no_boolean(key, settings):
    """Hydra passes no and off on as text, which Python takes for true."""
    with pytest.raises(ValueError, match=rf"policy_loss\.{key} must be true or false, got '(no|off)'"):
        M2POPolicyLossConfig(**settings)


def test_selected_wins_and_says_what_it_replaces(caplog):
    with caplog.at_level(logging.WARNING, logger="verl_m2po"):
        config = M2POPolicyLossConfig(selected="m2po", loss_mode="gspo")
    assert config.loss_mode == "m2po"
    assert "loss_mode=gspo" in caplog.text


def test_nothing_selected_leaves_loss_mode_alone(caplog):
    with caplog.at_level(logging.WARNING, logger="verl_m2po"):
        assert M2POPolicyLossConfig(loss_mode="gspo").loss_mode == "gspo"
        assert M2POPolicyLossConfig(selected="m2po").loss_mode == "m2po"
    assert not caplog.text


def test_built_by_hydra_with_and_without_nested_targets():
    for nested in ({"threshold": 0.1}, {"_target_": "verl_m2po.losses.config.M2POConfig", "threshold": 0.1}):
        config = instantiate(
            {"_target_": "verl_m2po.losses.config.M2POPolicyLossConfig", "selected": "m2po", "m2po": nested},
            _convert_="partial",
        )
        assert config.m2po.threshold == 0.1 and config.m2po.scope == "mini_batch"
