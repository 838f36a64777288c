#!/usr/bin/env bash
# M2PO | three steps on real GSM8K questions | tiny Qwen2 | FSDP2 and vLLM on the CPU

set -xeuo pipefail

########################### user-adjustable ###########################
LOSS=${LOSS:-m2po}
MODEL_PATH=${MODEL_PATH:-$HOME/models/verl-m2po-tiny}
DATA_DIR=${DATA_DIR:-$HOME/data/gsm8k}
# A local copy of GSM8K (JSON lines, parquet, or a folder with train and test); empty: from the hub
DATA_SOURCE=${DATA_SOURCE:-}
########################### end user-adjustable ###########################

########################### data and base model ###########################
[ -d "$MODEL_PATH" ] || python3 -m verl_m2po.tasks tiny-model --out "$MODEL_PATH"
[ -f "$DATA_DIR/train.parquet" ] || python3 -m verl_m2po.tasks prepare gsm8k --out "$DATA_DIR" ${DATA_SOURCE:+--source "$DATA_SOURCE"}

########################### launch ###########################
python3 -m verl.trainer.main_ppo \
    --config-name=gsm8k_smoke \
    loss="$LOSS" \
    actor_rollout_ref.model.path="$MODEL_PATH" \
    data.train_files="$DATA_DIR/train.parquet" \
    data.val_files="$DATA_DIR/test.parquet" \
    "$@"
