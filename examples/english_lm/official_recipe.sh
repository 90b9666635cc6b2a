#!/usr/bin/env bash
# The official repository's recipe (github.com/yushuiwx/MH-MoE, scripts/run.sh) on this plugin: SwiGLU experts of 2048,
# rotary positions, RMSNorm, no biases, top-1 of 8 experts with limited capacity.
# As published it never sets --mhmoe-heads-number, whose default there is 1, and so trains a plain sparse MoE:
# here it is explicit, HEADS=4 by default; HEADS=1 is what was published.
# SCALE=cpu keeps the flags and shrinks the model. See ../common.sh for the rest. Evaluate it in its own block length:
#   SCALE=paper TOKENS=2048 examples/english_lm/eval.sh official-h4
set -euo pipefail
# shellcheck source=examples/english_lm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

heads=${HEADS:-4}
case $SCALE in
paper)
    share_update 512 # blocks of 2048 tokens
    shape=(
        --decoder-ffn-embed-dim 2048 --moe-ffn-dim 2048 --tokens-per-sample 2048
        --lr "${LR:-6e-4}" --end-learning-rate 3e-5 --warmup-updates 375
        --max-update "${UPDATES:-100000}" --total-num-update "${UPDATES:-100000}"
    )
    ;;
cpu) shape=(--decoder-ffn-embed-dim 344 --moe-ffn-dim 344) ;;
esac
train "${NAME:-official-h$heads}" --arch "mhmoe_lm_$size" "${shape[@]}" \
    --moe-expert-count 8 --moe-freq 2 --moe-top-k 1 --moe-gating-use-fp32 \
    --moe-normalize-gate-prob-before-dropping --moe-eval-capacity-token-fraction -1.0 \
    --moe-gate-loss-wt 0.01 --moe-gate-loss-combine-method sum \
    --mhmoe-heads-number "$heads" --activation-fn silu --rotary-embed --rms-norm --no-bias \
    --no-token-positional-embeddings --no-scale-embedding --mhmoe-router linear --mhmoe-routing capacity \
    --adam-betas "(0.9, 0.95)" --clip-norm 2.0 --weight-decay 0.1 "$@"
