#!/usr/bin/env bash
# Zero-shot XNLI of a trained model with lm-evaluation-harness's prompts and metric, beside the paper's table 3:
#   XNLI=DIR examples/multilingual_lm/xnli.sh [CHECKPOINT] [flags of mhmoe zero-shot xnli, such as --limit 10]
# XNLI is your copy of the corpus, see `mhmoe zero-shot xnli --help`; needs the extra lm-eval.
set -euo pipefail
DATA=${DATA:-data/multilingual} CHECKPOINT=${1:-outputs/mhmoe_multilingual/checkpoint_best.pt}

mhmoe zero-shot xnli --checkpoint "$CHECKPOINT" --data "$DATA" --xnli-dir "$XNLI" --cpu "${@:2}"
