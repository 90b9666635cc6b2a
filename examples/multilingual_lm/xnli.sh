#!/usr/bin/env bash
# Zero-shot XNLI of runs in OUT, lm-evaluation-harness's prompts and metric, beside the paper's table 3:
#   XNLI=DIR examples/multilingual_lm/xnli.sh [NAME...]       XNLI: your copy of the corpus, see `mhmoe xnli --help`
# Without names: dense, xmoe and mhmoe-params. Needs the extra lm-eval. LANGS=de,fr: these languages alone; LIMIT=N: the
# first N examples of each, for a trial.
set -euo pipefail
# shellcheck source=examples/multilingual_lm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($#)) || set -- dense xmoe mhmoe-params
evaluate_xnli "$@"
