#!/usr/bin/env bash
# Perplexity of a trained model: examples/english_lm/eval.sh [CHECKPOINT] [flags of fairseq-eval-lm]
# mhmoe evaluate gives the same digits, and a record with the experts' loads that mhmoe report compares.
set -euo pipefail
DATA=${DATA:-data/web-bible} SPLIT=${SPLIT:-test} CHECKPOINT=${1:-outputs/mhmoe_lm/checkpoint_best.pt}

fairseq-eval-lm "$DATA" --user-dir mhmoe_fairseq --task mhmoe_language_modeling --path "$CHECKPOINT" --cpu \
    --gen-subset "$SPLIT" --tokens-per-sample 128 --sample-break-mode none --batch-size 32 \
    --distributed-world-size 1 "${@:2}"
