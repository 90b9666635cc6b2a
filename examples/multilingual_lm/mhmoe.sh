#!/usr/bin/env bash
# MH-MoE with X-MoE's parameters, or BUDGET=flops: its FLOPs and parameters. Its flags go to fairseq-train.
# All models of the table, and the paper's settings: mhmoe reproduce table1-multilingual --scale paper --dry-run
set -euo pipefail
DATA=${DATA:-data/multilingual} OUT=${OUT:-outputs/mhmoe_multilingual} UPDATES=${UPDATES:-300} SEED=${SEED:-1}
EXPERTS=${EXPERTS:-8} HEADS=${HEADS:-4} BUDGET=${BUDGET:-params} INTERVAL=$(((UPDATES + 1) / 2))
mkdir -p "$OUT"
fairseq-train "$DATA" --user-dir mhmoe_fairseq --cpu \
    --task mhmoe_multilingual_language_modeling --multilang-sampling-alpha 0.5 \
    --arch mhmoe_lm_tiny --moe-freq 2 --moe-top-k 2 --moe-expert-count "$EXPERTS" \
    --mhmoe-heads-number "$HEADS" --mhmoe-budget "$BUDGET" --dropout 0.1 \
    --tokens-per-sample 128 --sample-break-mode none --batch-size 16 --required-batch-size-multiple 1 \
    --criterion moe_cross_entropy --moe-gate-loss-wt 0.01 --clip-norm 1.0 --update-freq 1 \
    --optimizer mhmoe_adam --adam-betas "(0.9, 0.98)" --adam-eps 1e-6 --weight-decay 0.01 --lr 8e-3 \
    --lr-scheduler polynomial_decay --total-num-update "$UPDATES" --warmup-updates $((UPDATES / 10)) \
    --max-update "$UPDATES" --validate-interval-updates "$INTERVAL" --save-interval-updates "$INTERVAL" \
    --keep-interval-updates 1 --no-epoch-checkpoints --log-format json --log-interval 30 --num-workers 0 \
    --seed "$SEED" --distributed-world-size 1 --save-dir "$OUT" --log-file "$OUT/train.log" "$@"
