#!/usr/bin/env bash
# Fine-tunes a pre-trained MH-MoE to find images by texts and texts by images, and tests it.
# All models, and the paper's settings: mhmoe reproduce retrieval --scale paper --dry-run
set -euo pipefail
DATA=${DATA:-data/image-text} OUT=${OUT:-outputs/retrieval}
START=${START:-outputs/mhmoe_beit3/checkpoint_best.pt}
UPDATES=${UPDATES:-300} LR=${LR:-1e-3} INTERVAL=$(((${UPDATES:-300} + 1) / 2))
mkdir -p "$OUT"
fairseq-train "$DATA" --user-dir mhmoe_fairseq --task mhmoe_retrieval --finetune-from-model "$START" --cpu \
    --arch mhmoe_beit3_tiny --moe-freq 2 --moe-top-k 2 --moe-expert-count 8 \
    --mhmoe-heads-number 4 --mhmoe-budget params --dropout 0 \
    --img-size 64 --patch-size 16 --max-text-length 32 --batch-size 16 --required-batch-size-multiple 1 \
    --criterion mhmoe_retrieval --moe-gate-loss-wt 0.01 --clip-norm 1.0 --update-freq 1 \
    --optimizer mhmoe_adam --adam-betas "(0.9, 0.98)" --adam-eps 1e-6 --weight-decay 0.05 --lr "$LR" \
    --lr-scheduler cosine --warmup-updates $((UPDATES / 10)) --max-update "$UPDATES" --seed 1 --num-workers 0 \
    --best-checkpoint-metric mean_recall --maximize-best-checkpoint-metric \
    --validate-interval-updates "$INTERVAL" --save-interval-updates "$INTERVAL" --keep-interval-updates 1 \
    --no-epoch-checkpoints --log-format json --log-interval 30 --distributed-world-size 1 \
    --save-dir "$OUT" --log-file "$OUT/train.log" "$@"
mhmoe evaluate "$OUT/checkpoint_best.pt" --data "$DATA" --cpu
