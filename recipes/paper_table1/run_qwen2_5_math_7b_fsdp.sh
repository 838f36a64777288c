#!/usr/bin/env bash
# Table 1 of the paper, one cell | DeepScaleR-Preview | FSDP and vLLM on one node with eight GPUs

set -xeuo pipefail

########################### user-adjustable ###########################
# llama3_2_3b_instruct | qwen2_5_math_7b | qwen3_1_7b_base | qwen3_4b_base | qwen3_8b_base | qwen2_5_32b
MODEL=${MODEL:-qwen2_5_math_7b}
# grpo | gspo | m2po
LOSS=${LOSS:-m2po}
# on_policy (the paper's s=0) | s256
STALENESS=${STALENESS:-s256}
# eight_gpu | multi_node
HARDWARE=${HARDWARE:-eight_gpu}
PREPARE_DATA=${PREPARE_DATA:-1}
########################### end user-adjustable ###########################

########################### data ###########################
if [ "$PREPARE_DATA" != 0 ]; then
for set in deepscaler math500 aime24 aime25 amc23 amc24 gaokao minerva olympiad; do
    split=$([ "$set" = deepscaler ] && echo train || echo test)
    [ -f "$HOME/data/$set/$split.parquet" ] || python3 -m verl_m2po.tasks prepare "$set" --out "$HOME/data/$set"
done
fi

########################### launch ###########################
python3 -m verl.trainer.main_ppo \
    --config-name=paper_table1 \
    model="$MODEL" \
    loss="$LOSS" \
    staleness="$STALENESS" \
    hardware="$HARDWARE" \
    trainer.experiment_name="${MODEL}_${LOSS}_${STALENESS}" \
    "$@"
