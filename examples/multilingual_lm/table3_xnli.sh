#!/usr/bin/env bash
# The paper's table 3: the models of table 1 (trained if they are not), then zero-shot XNLI of all.
#   XNLI=DIR examples/multilingual_lm/table3_xnli.sh [flags for fairseq-train]       see table1_multilingual.sh, xnli.sh
set -euo pipefail
# shellcheck source=examples/multilingual_lm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

require_xnli
train_table1 "$@"
evaluate_xnli "${names[@]}"
