#!/usr/bin/env bash
# Perplexity of masked patches and words of runs in OUT, and a report: eval.sh [NAME...]
# Without names: dense, xmoe and mhmoe-params.
set -euo pipefail
# shellcheck source=examples/masked_multimodal/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($#)) || set -- dense xmoe mhmoe-params
compare "$OUT/report.md" "$@"
