#!/usr/bin/env bash
# Fine-tunes an MH-MoE language model to classify, such as English NLI, and tests it in every language that is prepared.
#   DATA=DIR examples/multilingual_lm/classification.sh         DIR: made by mhmoe prepare classification
# All models, and the settings at paper scale: mhmoe reproduce classification --scale paper --dry-run
set -euo pipefail
DATA=${DATA:-data/nli} OUT=${OUT:-outputs/nli} START=${START:-outputs/mhmoe_multilingual/checkpoint_best.pt}
UPDATES=${UPDATES:-300} INTERVAL=$(((${UPDATES:-300} + 1) / 2))
mkdir -p "$OUT"
fairseq-train "$DATA" --user-dir mhmoe_fairseq --task mhmoe_sentence_classification --cpu \
    --finetune-from-model "$START" --arch mhmoe_lm_tiny \
    --moe-freq 2 --moe-top-k 2 --moe-expert-count 8 --mhmoe-heads-number 4 --mhmoe-budget params \
    --tokens-per-sample 128 --batch-size 16 --required-batch-size-multiple 1 --dropout 0.1 \
    --criterion mhmoe_sentence_classification --moe-gate-loss-wt 0.01 --clip-norm 1.0 --update-freq 1 \
    --optimizer mhmoe_adam --adam-betas "(0.9, 0.98)" --adam-eps 1e-6 --weight-decay 0.01 --lr 1e-3 \
    --lr-scheduler polynomial_decay --total-num-update "$UPDATES" --warmup-updates $((UPDATES / 10)) \
    --max-update "$UPDATES" --valid-subset "${VALID:-valid_en}" --best-checkpoint-metric accuracy \
    --maximize-best-checkpoint-metric --validate-interval-updates "$INTERVAL" --save-interval-updates "$INTERVAL" \
    --keep-interval-updates 1 --no-epoch-checkpoints --log-format json --log-interval 30 --num-workers 0 \
    --seed 1 --distributed-world-size 1 --save-dir "$OUT" --log-file "$OUT/train.log" "$@"
mhmoe evaluate "$OUT/checkpoint_best.pt" --data "$DATA" --cpu
