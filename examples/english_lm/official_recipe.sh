#!/usr/bin/env bash
# The official repository's recipe (github.com/yushuiwx/MH-MoE, scripts/run.sh) on this plugin, in a small model: SwiGLU
# experts, rotary positions, RMSNorm, no biases, top-1 of 8 experts with limited capacity. As published it never sets
# --mhmoe-heads-number, whose default there is 1, and so trains a plain sparse MoE: HEADS=1 is what was published.
# Its own size and schedule: mhmoe reproduce official --scale paper --dry-run
set -euo pipefail
DATA=${DATA:-data/web-bible} OUT=${OUT:-outputs/official_lm} UPDATES=${UPDATES:-300} SEED=${SEED:-1} HEADS=${HEADS:-4}
INTERVAL=$(((UPDATES + 3) / 4))
mkdir -p "$OUT"
fairseq-train "$DATA" --user-dir mhmoe_fairseq --task mhmoe_language_modeling --cpu \
    --arch mhmoe_lm_tiny --decoder-ffn-embed-dim 344 --moe-ffn-dim 344 --activation-fn silu --rotary-embed --rms-norm \
    --no-bias --no-token-positional-embeddings --no-scale-embedding --dropout 0.1 \
    --moe-expert-count 8 --moe-freq 2 --moe-top-k 1 --mhmoe-heads-number "$HEADS" --mhmoe-router linear \
    --mhmoe-routing capacity --moe-gating-use-fp32 --moe-normalize-gate-prob-before-dropping \
    --moe-eval-capacity-token-fraction -1.0 --moe-gate-loss-wt 0.01 --moe-gate-loss-combine-method sum \
    --tokens-per-sample 128 --sample-break-mode none --batch-size 16 --required-batch-size-multiple 1 \
    --criterion moe_cross_entropy --clip-norm 2.0 --update-freq 1 \
    --optimizer mhmoe_adam --adam-betas "(0.9, 0.95)" --adam-eps 1e-6 --weight-decay 0.1 --lr 8e-3 \
    --lr-scheduler polynomial_decay --total-num-update "$UPDATES" --warmup-updates $((UPDATES / 10)) \
    --max-update "$UPDATES" --validate-interval-updates "$INTERVAL" --save-interval-updates "$INTERVAL" \
    --keep-interval-updates 1 --no-epoch-checkpoints --log-format json --log-interval 15 --num-workers 0 \
    --seed "$SEED" --distributed-world-size 1 --save-dir "$OUT" --log-file "$OUT/train.log" "$@"
