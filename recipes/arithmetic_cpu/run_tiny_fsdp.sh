#!/usr/bin/env bash
# M2PO | two-digit addition | tiny Qwen2 | FSDP2 and vLLM on the CPU

set -xeuo pipefail

########################### user-adjustable ###########################
LOSS=${LOSS:-m2po}
STALENESS=${STALENESS:-on_policy}
STEPS=${STEPS:-60}
MODEL_PATH=${MODEL_PATH:-$HOME/models/verl-m2po-tiny}
DATA_DIR=${DATA_DIR:-$HOME/data/arithmetic}
########################### end user-adjustable ###########################

########################### data and base model ###########################
[ -d "$MODEL_PATH" ] || python3 -m verl_m2po.tasks tiny-model --out "$MODEL_PATH"
[ -f "$DATA_DIR/train.parquet" ] || python3 -m verl_m2po.tasks arithmetic --out "$DATA_DIR"

########################### launch ###########################
python3 -m verl.trainer.main_ppo \
    --config-name=arithmetic \
    hardware=cpu \
    loss="$LOSS" \
    staleness="$STALENESS" \
    actor_rollout_ref.model.path="$MODEL_PATH" \
    data.train_files="$DATA_DIR/train.parquet" \
    data.val_files="$DATA_DIR/validation.parquet" \
    trainer.total_training_steps="$STEPS" \
    "$@"
