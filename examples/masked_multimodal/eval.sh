#!/usr/bin/env bash
# Perplexity of masked patches and words of a trained model: eval.sh [CHECKPOINT] [flags]
set -euo pipefail
DATA=${DATA:-data/image-text} SPLIT=${SPLIT:-test} CHECKPOINT=${1:-outputs/mhmoe_beit3/checkpoint_best.pt}

mhmoe evaluate "$CHECKPOINT" --data "$DATA" --split "$SPLIT" --cpu "${@:2}"
