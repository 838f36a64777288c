"""verl's own example scripts: unchanged by the plugin, and trained with M2PO at staleness 256 by three overrides."""

import re
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import yaml
from composing import ADDED, REPLACED, additions, all_composed, changes, select
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass

from verl_m2po.launch.checks import losses
from verl_m2po.staleness import checks
from verl_m2po.staleness.checks import memory

# About 260 compositions in two processes: a minute on two idle cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

M2PO_AT_256 = {
    "algorithm.policy_loss": "m2po",
    "trainer.v1.trainer_mode": "stale_k",
    "trainer.v1.stale_k.staleness_updates": "256",
}
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


class Raw(yaml.SafeLoader):
    """Every scalar is text as written: an override has no type before Hydra reads it."""


# Which leaves the one for merging mappings.
Raw.yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}
TEXT = Path(__file__).with_name("verl_example_overrides.yaml").read_text()
SCRIPTS: dict[str, dict] = yaml.load(TEXT, Raw)["scripts"]
CONFIGS: dict[str, dict] = yaml.safe_load(TEXT)["configs"]

# Scripts that verl 0.9.1 itself does not compose, with and without the plugin: what its message names.
_SAMPLER = "data.sampler.class_name"
_GRAD_OFFLOAD = "actor_rollout_ref.actor.megatron.grad_offload"
REFUSED_BY_VERL = {
    "grpo_trainer/run_deepseek_v3_671b_megatron.sh": _GRAD_OFFLOAD,
    "grpo_trainer/run_deepseek_v4_flash_megatron.sh": _GRAD_OFFLOAD,
    "grpo_trainer/run_deepseek_v4_veomni.sh": "data.continuous_token.enable",
    "grpo_trainer/run_gpt_oss_20b_fsdp.sh": "actor_rollout_ref.actor.fsdp_config.model_dtype",
    "grpo_trainer/run_moonlight_16b_automodel.sh": "model_engine/automodel",
    "grpo_trainer/run_qwen3_235b_a22b_megatron.sh": _GRAD_OFFLOAD,
    "grpo_trainer/run_qwen3_30b_a3b_megatron.sh": _GRAD_OFFLOAD,
    "grpo_trainer/run_qwen3_vl_235b_a22b_megatron.sh": _GRAD_OFFLOAD,
    "grpo_trainer/run_qwen3_vl_30b_a3b_megatron.sh": _GRAD_OFFLOAD,
    "grpo_trainer/run_qwen3_vl_30b_moe_veomni.sh": "trainer.use_legacy_worker_impl",
    "dppo_trainer/run_qwen3_30b_a3b_megatron.sh": _GRAD_OFFLOAD,
    "gspo_trainer/run_qwen3_30b_a3b_megatron.sh": _GRAD_OFFLOAD,
    "mtp_trainer/run_mimo_7b_mtp_megatron.sh": _GRAD_OFFLOAD,
    "mtp_trainer/run_mimo_7b_mtp_rl_vllm_sgl_megatron.sh": _GRAD_OFFLOAD,
    "router_replay/run_qwen3_30b_a3b_megatron.sh": "actor_rollout_ref.actor.megatron.tensor_model_parallel_size",
    "sglang_multiturn/gsm8k_toolcall_shaping/run_qwen2_5_0_5b_gsm8k_toolcall_shaping_fsdp.sh": _SAMPLER,
    "sglang_multiturn/run_qwen2_5_0_5b_gsm8k_multiturn_curriculum_fsdp.sh": _SAMPLER,
    "tuning/lora/run_qwen2_5_vl_7b_fsdp.sh": "actor_rollout_ref.model.modules_to_save",
    "tuning/lora/run_qwen3_30b_a3b_megatron.sh": _GRAD_OFFLOAD,
    "tuning/lora/run_qwen3_8b_merge_fsdp.sh": "actor_rollout_ref.model.lora.merge",
    "tuning/scaling/run_qwen2_5_32b_megatron.sh": "actor_rollout_ref.actor.model_engine",
}
# Composes, and then verl's PolicyLossConfig has no such field: fails with the script's own loss as well.
REFUSED_BY_VERLS_DATACLASS = {"sapo_trainer/run_qwen3_30b_a3b_fsdp.sh": "tau_pos"}
# Cannot do at staleness 256 what it says: what the preflight names.
REFUSED_BY_PREFLIGHT = {
    # 3 updates a trainer step
    "grpo_trainer/run_moonlight_16b_a3b_megatron.sh": {"trainer.v1.stale_k.staleness_updates"},
    # It ends before the first rollout of its own weights would be trained on
    "grpo_trainer/run_qwen3_30b_veomni.sh": {"trainer.v1.stale_k.staleness_updates"},
    "sglang_multiturn/run_qwen2_5_3b_gsm8k_tool_agent_mlflow_fsdp.sh": {"trainer.v1.stale_k.staleness_updates"},
    # Asks for weights proximal over behaviour policy, which M2PO's own ratio leaves no place for
    "grpo_trainer/run_qwen3_vl_30b_a3b_fsdp.sh": {"algorithm.rollout_correction.bypass_mode"},
    # verl makes no such weights where old_log_probs are the rollout's
    "rollout_correction/run_qwen2_5_7b_fsdp.sh": {"algorithm.rollout_correction.rollout_is"},
    "rollout_correction/run_qwen2_5_7b_fsdp_multi_rs.sh": {"algorithm.rollout_correction.rollout_is"},
}
COMPOSING = sorted(SCRIPTS.keys() - REFUSED_BY_VERL.keys())


class Compositions(NamedTuple):
    """Every script: by verl alone, with the plugin, and with M2PO at staleness 256 appended."""

    verl: dict[str, dict | str]
    plugin: dict[str, dict | str]
    m2po: dict[str, dict | str]


def overrides(script: str) -> list[str]:
    """What `script` passes on its command line."""
    return [f"{key}={value}".replace("$HOME", "/home/someone") for key, value in SCRIPTS[script]["settings"].items()]


@pytest.fixture(scope="module")
def compositions(tmp_path_factory) -> Compositions:
    directory = tmp_path_factory.mktemp("sglang_multiturn")
    for name, config in CONFIGS.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def requests(appended: dict[str, str]) -> list[tuple[str, list[str], str | None]]:
        more = [f"{key}={value}" for key, value in appended.items()]
        configs = {script: SCRIPTS[script]["config"] for script in SCRIPTS}
        return [
            (configs[script], overrides(script) + more, str(directory) if configs[script] in CONFIGS else None)
            for script in SCRIPTS
        ]

    with ThreadPoolExecutor() as pool:
        verls = pool.submit(all_composed, requests({}), plugin=False)
        both = all_composed([*requests({}), *requests(M2PO_AT_256)], plugin=True)
    return Compositions(
        verl=dict(zip(SCRIPTS, verls.result(), strict=True)),
        plugin=dict(zip(SCRIPTS, both[: len(SCRIPTS)], strict=True)),
        m2po=dict(zip(SCRIPTS, both[len(SCRIPTS) :], strict=True)),
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_plugin_adds_keys_and_changes_no_value(script, compositions):
    before, after = compositions.verl[script], compositions.plugin[script]
    if script in REFUSED_BY_VERL:
        # An option that does not exist is answered with the search path as well, which the plugin adds to.
        before, after = (message.partition("Config search path:")[0] for message in (before, after))
        assert before == after and REFUSED_BY_VERL[script] in before
        return
    assert isinstance(before, dict) and isinstance(after, dict), (before, after)
    assert changes(before, after) == REPLACED
    assert additions(before, after) == ADDED


@pytest.mark.parametrize("script", COMPOSING)
def test_three_overrides_change_three_settings(script, compositions):
    after = compositions.m2po[script]
    assert isinstance(after, dict), after
    assert changes(compositions.plugin[script], after) == M2PO_AT_256.keys()
    assert {key: str(select(after, key)) for key in M2PO_AT_256} == M2PO_AT_256


@pytest.mark.parametrize("script", COMPOSING)
def test_m2po_reaches_the_actor_and_wins_over_the_scripts_own_loss(script, compositions):
    actor = OmegaConf.create(compositions.m2po[script]).actor_rollout_ref.actor
    if script in REFUSED_BY_VERLS_DATACLASS:
        with pytest.raises(Exception, match=REFUSED_BY_VERLS_DATACLASS[script]):
            omega_conf_to_dataclass(actor)
        return
    policy_loss = omega_conf_to_dataclass(actor).policy_loss
    assert (policy_loss.loss_mode, policy_loss.m2po.threshold) == ("m2po", 0.04)


@pytest.mark.parametrize("script", sorted(set(COMPOSING) - set(REFUSED_BY_VERLS_DATACLASS)))
def test_without_our_override_its_own_loss_stays(script, compositions):
    actor = OmegaConf.create(compositions.plugin[script]).actor_rollout_ref.actor
    own = SCRIPTS[script]["settings"].get("actor_rollout_ref.actor.policy_loss.loss_mode", "vanilla")
    assert omega_conf_to_dataclass(actor).policy_loss.loss_mode == own


@pytest.mark.parametrize("script", sorted(set(COMPOSING) - set(REFUSED_BY_VERLS_DATACLASS)))
def test_the_preflight_lets_it_through_or_says_why_not(script, compositions, monkeypatch):
    # A machine that these scripts are for.
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("memory", "total")(2 * 2**40))
    config = OmegaConf.create(compositions.m2po[script])
    memory.make_room(config)
    found = [*losses.problems(config), *checks.check(config, psutil.virtual_memory().total)]
    assert {problem.key for problem in found if problem.is_fatal} == REFUSED_BY_PREFLIGHT.get(script, set())


def test_the_compatibility_page_tells_the_same():
    rows = dict(re.findall(r"^\| `([\w./-]+\.sh)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE))
    assert rows.keys() == SCRIPTS.keys()
    reasons = {
        **REFUSED_BY_VERL,
        **REFUSED_BY_VERLS_DATACLASS,
        **{script: "preflight" for script in REFUSED_BY_PREFLIGHT},
    }
    assert {script: text for script, text in rows.items() if reasons.get(script, "yes") not in text} == {}
    total, composing = len(SCRIPTS), len(COMPOSING)
    taken = list(rows.values()).count("yes")
    assert f"{total} scripts, of which verl 0.9.1 composes {composing}" in PAGE.read_text()
    assert f"{taken} take M2PO at staleness 256" in PAGE.read_text()
