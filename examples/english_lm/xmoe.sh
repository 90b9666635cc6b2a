#!/usr/bin/env bash
# The X-MoE baseline: MoE every second layer, top-2, EXPERTS experts (default 8). See common.sh for the rest.
set -euo pipefail
# shellcheck source=examples/english_lm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

router=()
# The router of the paper's appendix; at CPU scale TorchScale's, as in the study.
[[ $SCALE != paper ]] || router=(--mhmoe-router-preset p1)
train "${NAME:-xmoe}" --arch "xmoe_lm_$size" --moe-freq 2 --moe-top-k 2 --moe-expert-count "${EXPERTS:-8}" \
    "${router[@]}" "$@"
