#!/usr/bin/env bash
# Perplexity and bits per character of runs in OUT, every language and all, and a report: eval.sh [NAME...]
# Without names: dense, xmoe and mhmoe-params. LANGS=de,fr evaluates on these languages alone.
set -euo pipefail
# shellcheck source=examples/multilingual_lm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($#)) || set -- dense xmoe mhmoe-params
compare "$OUT/report.md" "$@"
