"""verl's own example scripts as data, and what becomes of each with M2PO at staleness 256.

The tests compare with verl alone; docs/generate_compatibility.py writes the table of the page from the same.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from composing import all_composed
from omegaconf import OmegaConf

from verl_m2po.ground.check import ask_all
from verl_m2po.launch import registry
from verl_m2po.staleness.checks import memory

M2PO_AT_256 = {
    "algorithm.policy_loss": "m2po",
    "trainer.v1.trainer_mode": "stale_k",
    "trainer.v1.stale_k.staleness_updates": "256",
}


class Raw(yaml.SafeLoader):
    """Every scalar is text as written: an override has no type before Hydra reads it."""


# Which leaves the one for merging mappings.
Raw.yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}
TEXT = (Path(__file__).parents[1] / "config" / "verl_example_overrides.yaml").read_text()
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

COMPOSING = sorted(SCRIPTS.keys() - REFUSED_BY_VERL.keys())

MEMORY_BYTES = 2 * 2**40
"""Of a machine that these scripts are for."""


def overrides(script: str) -> list[str]:
    """What `script` passes on its command line."""
    return [f"{key}={value}".replace("$HOME", "/home/someone") for key, value in SCRIPTS[script]["settings"].items()]


def requests(appended: dict[str, str], directory: Path) -> list[tuple[str, list[str], str | None]]:
    """What `composing.all_composed` takes, for every script with more overrides behind its own.

    Args:
        directory: where the configs of verl's multi-turn examples are written.
    """
    for name, config in CONFIGS.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    more = [f"{key}={value}" for key, value in appended.items()]
    configs = {script: SCRIPTS[script]["config"] for script in SCRIPTS}
    return [
        (configs[script], overrides(script) + more, str(directory) if configs[script] in CONFIGS else None)
        for script in SCRIPTS
    ]


def composed_at_256(directory: Path) -> dict[str, dict | str]:
    """Every script with M2PO at staleness 256; a string is verl's error."""
    composed = all_composed(requests(M2PO_AT_256, directory), plugin=True)
    return dict(zip(SCRIPTS, composed, strict=True))


def refusals(script: str, composition: dict) -> list[str]:
    """What the preflight has against `script` on a machine that it is for, with its files there."""
    set_by_hand = [*overrides(script), *(f"{key}={value}" for key, value in M2PO_AT_256.items())]
    config = OmegaConf.create(composition | {"hydra": {"overrides": {"task": set_by_hand}}})
    memory.make_room(config)
    found = ask_all([*registry.OF_ALL_RUNS, *registry.of_the_config(MEMORY_BYTES)], config)
    return [str(problem) for problem in found if problem.is_fatal]


def verdict(script: str, composition: dict | str) -> str:
    """What becomes of `script` with M2PO at staleness 256, in the words of the page."""
    if script in REFUSED_BY_VERL:
        return f"refused by verl: `{REFUSED_BY_VERL[script]}`"
    if script in REFUSED_BY_VERLS_DATACLASS:
        return (
            f"refused by verl: its `PolicyLossConfig` has no `{REFUSED_BY_VERLS_DATACLASS[script]}`, whatever the loss"
        )
    assert isinstance(composition, dict), composition
    refused = refusals(script, composition)
    return f"refused: {' '.join(refused)}" if refused else "composes"


def rows(compositions: dict[str, dict | str]) -> Iterator[str]:
    """The table of the page."""
    yield from ("| script | with M2PO at staleness 256 |", "| --- | --- |")
    for script, composition in compositions.items():
        said = verdict(script, composition).replace("|", "\\|").replace("<", "&lt;")
        yield f"| `{script}` | {said} |"


def counts(table: list[str]) -> str:
    """The sentence on the table's numbers, for the page and README.md."""
    said = [row.split(" | ")[1] for row in table[2:]]
    by_verl = sum(verdict.startswith("refused by verl") for verdict in said)
    composing = sum(verdict.startswith("composes") for verdict in said)
    by_us = len(said) - by_verl - composing
    return (
        f"{len(said)} of verl's scripts were tried, without a GPU: {composing} compose with these three overrides, "
        f"{by_verl} are refused by verl 0.9.1 itself, and {by_us} by the preflight, which says why."
    )
