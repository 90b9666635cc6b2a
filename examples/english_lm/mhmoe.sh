#!/usr/bin/env bash
# MH-MoE: HEADS heads (default 4) and the BUDGET of X-MoE with EXPERTS experts (default 8): params keeps its parameters
# (the paper's tables), flops keeps its FLOPs and parameters (the second paper's rule). See common.sh for the rest.
set -euo pipefail
# shellcheck source=examples/english_lm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

budget=${BUDGET:-params}
router=()
[[ $SCALE != paper ]] || router=(--mhmoe-router-preset p1)
train "${NAME:-mhmoe-$budget}" --arch "mhmoe_lm_$size" --moe-freq 2 --moe-top-k 2 --moe-expert-count "${EXPERTS:-8}" \
    --mhmoe-heads-number "${HEADS:-4}" --mhmoe-budget "$budget" "${router[@]}" "$@"
