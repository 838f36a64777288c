"""Which settings a run on the bench may change; all others only a run through verl honours, so they are refused."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
# Keys, or with a dot at their end all below.
READ = (
    *(f"{ACTOR}.{key}" for key in ("optim.", "policy_loss.", "use_dynamic_bsz", "ppo_epochs", "loss_agg_mode")),
    *(f"{ACTOR}.{key}" for key in ("ppo_mini_batch_size", "ppo_micro_batch_size_per_gpu", "loss_scale_factor")),
    *(f"{ACTOR}.{key}" for key in ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c")),
    *(f"{ACTOR}.{key}" for key in ("tau_pos", "tau_neg", "entropy_coeff", "calculate_entropy")),
    *("algorithm.", "data.train_batch_size", "data.seed"),
    *(f"{ROLLOUT}.{key}" for key in ("n", "seed", "temperature")),
    *(f"trainer.{key}" for key in ("total_training_steps", "test_freq", "val_before_train")),
    *(
        f"trainer.{key}"
        for key in ("experiment_name", "project_name", "logger", "v1.trainer_mode", "v1.staleness_label")
    ),
    *(f"trainer.v1.{mode}.staleness_updates" for mode in ("stale_k", "stale_k_separate", "bounded_async", "replay")),
    "trainer.v1.bounded_async.adaptive.",
)
# Devices, processes, memory and faults, and what is without effect where the settings that `setup` checks are off.
WITHOUT_EFFECT = (
    *("ray_kwargs.", "transfer_queue.", "global_profiler.", "distillation.", "critic.", "trainer.v1."),
    *("reward.num_workers", "data.dataloader_num_workers", "data.val_batch_size"),
    *("actor_rollout_ref.ref.", "actor_rollout_ref.hybrid_engine", "actor_rollout_ref.nccl_timeout"),
    *(f"{ACTOR}.{key}" for key in ("strategy", "fsdp_config.", "checkpoint.", "profiler.", "use_torch_compile")),
    *(f"{ACTOR}.{key}" for key in ("use_remove_padding", "use_fused_kernels", "use_prefix_grouper", "pad_to_length")),
    *(f"{ACTOR}.{key}" for key in ("ppo_max_token_len_per_gpu", "ulysses_sequence_parallel_size", "grad_clip")),
    *(f"{ACTOR}.{key}" for key in ("entropy_from_logits_with_chunking", "entropy_from_logits_chunk_size")),
    *(f"{ACTOR}.{key}" for key in ("entropy_checkpointing", "data_loader_seed", "kl_loss_coef", "kl_loss_type")),
    *(f"{MODEL}.{key}" for key in ("enable_gradient_checkpointing", "enable_activation_offload", "use_shm")),
    *(f"{MODEL}.{key}" for key in ("use_remove_padding", "use_liger", "use_fused_kernels", "fused_kernel_options.")),
    *(f"{MODEL}.{key}" for key in ("tiled_mlp.", "trust_remote_code", "override_config.attn_implementation")),
    *(f"{ROLLOUT}.{key}" for key in ("name", "mode", "nnodes", "n_gpus_per_node", "dtype", "load_format")),
    *(f"{ROLLOUT}.{key}" for key in ("gpu_memory_utilization", "enforce_eager", "cudagraph_capture_sizes")),
    *(f"{ROLLOUT}.{key}" for key in ("free_cache_engine", "enable_sleep_mode", "layered_summon", "max_num_seqs")),
    *(f"{ROLLOUT}.{key}_parallel_size" for key in ("tensor_model", "data", "expert", "pipeline_model")),
    *(f"{ROLLOUT}.{key}" for key in ("max_num_batched_tokens", "enable_chunked_prefill", "enable_prefix_caching")),
    *(f"{ROLLOUT}.{key}" for key in ("log_prob_micro_batch_size", "log_prob_micro_batch_size_per_gpu")),
    *(f"{ROLLOUT}.{key}" for key in ("log_prob_use_dynamic_bsz", "log_prob_max_token_len_per_gpu")),
    *(f"{ROLLOUT}.{key}" for key in ("disable_log_stats", "agent.num_workers", "checkpoint_engine.", "trace.")),
    *(f"{ROLLOUT}.{key}" for key in ("profiler.", "prometheus.", "multi_stage_wake_up", "scheduling_policy")),
    *(f"{ROLLOUT}.engine_kwargs.vllm.{key}" for key in ("distributed_executor_backend", "worker_extension_cls")),
    *(f"trainer.{key}" for key in ("device", "nnodes", "n_gpus_per_node", "balance_batch", "default_local_dir")),
    *(f"trainer.{key}" for key in ("max_actor_ckpt_to_keep", "max_critic_ckpt_to_keep", "esi_redundant_time")),
    *(
        f"trainer.{key}"
        for key in ("default_hdfs_dir", "del_local_ckpt_after_load", "ray_wait_register_center_timeout")
    ),
)
# Below one of the above, but not so.
REFUSED = (
    *("algorithm.filter_groups.", "algorithm.use_pf_ppo", "algorithm.pf_ppo.", "distillation.enabled"),
    *("trainer.v1.sampler.", "trainer.v1.replay.reference."),
)
# Polls as the devices need it and chooses nothing.
POLLING = {"path": "pkg://verl_m2po.cpu.sampler", "name": "replay_buffer"}
NOT_SET = object()


def _leaves(node: Any, key: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested dictionaries; an empty one has none."""
    if not isinstance(node, dict):
        return {key: node}
    leaves: dict[str, Any] = {}
    for name, child in node.items():
        leaves |= _leaves(child, f"{key}.{name}" if key else str(name))
    return leaves


def _changed(config: DictConfig, base: DictConfig) -> dict[str, Any]:
    """Leaves of `config` that were set to something else than in `base`, not those that only refer to such a one."""

    def differing(resolve: bool) -> dict[str, Any]:
        values, before = (_leaves(OmegaConf.to_container(each, resolve=resolve)) for each in (config, base))
        keys = dict.fromkeys((*values, *before))
        return {k: values.get(k) for k in keys if values.get(k, NOT_SET) != before.get(k, NOT_SET)}

    as_written = differing(resolve=False)
    return {key: value for key, value in differing(resolve=True).items() if key in as_written}


def _is_one_of(key: str, keys: tuple[str, ...]) -> bool:
    return any(key.startswith(wanted) if wanted.endswith(".") else key == wanted for wanted in keys)


def concerns_devices(key: str) -> bool:
    """Whether `key` is about what one process does not have: devices, servers, TransferQueue.

    Of the settings of a trainer mode none is, although many change nothing here: a wrong one is wrong.
    """
    return _is_one_of(key, WITHOUT_EFFECT) and not key.startswith("trainer.v1.")


def not_honoured(config: DictConfig, base: DictConfig) -> dict[str, Any]:
    """Settings of `config` that only verl honours, with their values.

    Args:
        config: Of a run.
        base: What the bench does where nothing is changed.
    """
    polling = {f"trainer.v1.sampler.custom_sampler.{name}": value for name, value in POLLING.items()}
    return {
        key: value
        for key, value in _changed(config, base).items()
        if (_is_one_of(key, REFUSED) or not _is_one_of(key, (*READ, *WITHOUT_EFFECT)))
        and polling.get(key, NOT_SET) != value
    }
