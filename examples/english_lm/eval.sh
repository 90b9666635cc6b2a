#!/usr/bin/env bash
# Validation and test perplexity of runs in OUT, and a report: examples/english_lm/eval.sh [NAME...]
# Without names: dense, xmoe, mhmoe-params and mhmoe-flops. Use the SCALE of the training: it fixes the context.
set -euo pipefail
# shellcheck source=examples/english_lm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($#)) || set -- dense xmoe mhmoe-params mhmoe-flops
compare "$OUT/report.md" "$@"
