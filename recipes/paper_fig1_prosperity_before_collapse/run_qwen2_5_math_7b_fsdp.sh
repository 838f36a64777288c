#!/usr/bin/env bash
# The paper's title figure, one curve | DeepScaleR-Preview | FSDP and vLLM on one node with eight GPUs

set -xeuo pipefail

########################### user-adjustable ###########################
# qwen2_5_math_7b | llama3_2_3b_instruct
MODEL=${MODEL:-qwen2_5_math_7b}
# no_trust_region | grpo | m2po
LOSS=${LOSS:-no_trust_region}
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
    --config-name=paper_fig1_prosperity_before_collapse \
    model="$MODEL" \
    loss="$LOSS" \
    staleness="$STALENESS" \
    hardware="$HARDWARE" \
    trainer.experiment_name="${MODEL}_${LOSS}_${STALENESS}" \
    "$@"
