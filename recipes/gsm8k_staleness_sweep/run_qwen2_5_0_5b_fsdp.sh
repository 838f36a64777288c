#!/usr/bin/env bash
# GRPO and M2PO at several ages of the data | GSM8K | Qwen2.5-0.5B-Instruct | FSDP and vLLM on one GPU

set -xeuo pipefail

########################### user-adjustable ###########################
# Comma-separated options of the groups: every combination is one run, one after the other
LOSS=${LOSS:-grpo,m2po}
STALENESS=${STALENESS:-on_policy,s64,s256}
MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-0.5B-Instruct}
DATA_DIR=${DATA_DIR:-$HOME/data/gsm8k}
########################### end user-adjustable ###########################

########################### data ###########################
[ -f "$DATA_DIR/train.parquet" ] || python3 -m verl_m2po.tasks prepare gsm8k --out "$DATA_DIR"

########################### launch ###########################
python3 -m verl.trainer.main_ppo \
    --config-name=gsm8k_staleness_sweep \
    --multirun \
    loss="$LOSS" \
    staleness="$STALENESS" \
    actor_rollout_ref.model.path="$MODEL_PATH" \
    data.train_files="$DATA_DIR/train.parquet" \
    data.val_files="$DATA_DIR/test.parquet" \
    "$@"
