#!/usr/bin/env bash
# Perplexity and bits per character of a trained model, every language and all: eval.sh [CHECKPOINT] [flags]
set -euo pipefail
DATA=${DATA:-data/multilingual} SPLIT=${SPLIT:-test} CHECKPOINT=${1:-outputs/mhmoe_multilingual/checkpoint_best.pt}

mhmoe evaluate "$CHECKPOINT" --data "$DATA" --split "$SPLIT" --cpu "${@:2}"
