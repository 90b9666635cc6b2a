#!/usr/bin/env bash
# Fine-tunes an MH-MoE that answers questions (vqa.sh) to judge statements about two images, and tests it.
# All models, and the paper's settings: mhmoe reproduce nlvr2 --scale paper --dry-run
set -euo pipefail
DATA=${DATA:-data/image-text} OUT=${OUT:-outputs/nlvr2}
START=${START:-outputs/vqa/checkpoint_best.pt}
UPDATES=${UPDATES:-600} LR=${LR:-1e-4} INTERVAL=$(((${UPDATES:-600} + 1) / 2))
mkdir -p "$OUT"
fairseq-train "$DATA" --user-dir mhmoe_fairseq --task mhmoe_nlvr2 --finetune-from-model "$START" --cpu \
    --arch mhmoe_beit3_tiny --moe-freq 2 --moe-top-k 2 --moe-expert-count 8 \
    --mhmoe-heads-number 4 --mhmoe-budget params --dropout 0 --head-lr-multiplier 10 --center-features \
    --img-size 64 --patch-size 16 --max-text-length 32 --batch-size 32 --required-batch-size-multiple 1 \
    --criterion mhmoe_nlvr2 --moe-gate-loss-wt 0.01 --clip-norm 1.0 --update-freq 1 \
    --optimizer mhmoe_adam --adam-betas "(0.9, 0.98)" --adam-eps 1e-6 --weight-decay 0.05 --lr "$LR" \
    --lr-scheduler cosine --warmup-updates $((UPDATES / 10)) --max-update "$UPDATES" --seed 1 --num-workers 0 \
    --best-checkpoint-metric accuracy --maximize-best-checkpoint-metric \
    --validate-interval-updates "$INTERVAL" --save-interval-updates "$INTERVAL" --keep-interval-updates 1 \
    --no-epoch-checkpoints --log-format json --log-interval 60 --distributed-world-size 1 \
    --save-dir "$OUT" --log-file "$OUT/train.log" "$@"
mhmoe evaluate "$OUT/checkpoint_best.pt" --data "$DATA" --cpu
