#!/usr/bin/env bash
# The paper's table 6: what the projections and the splitting are worth. See ../common.sh for the settings.
set -euo pipefail
# shellcheck source=examples/english_lm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

projections=(--mhmoe-head-projection on --mhmoe-merge-projection on)
in_turn "$here/dense.sh" "$@"
# The dense network between two projections is an MoE layer of one expert, which every token uses with weight 1.
NAME=dense-projections EXPERTS=1 in_turn "$here/xmoe.sh" --moe-top-k 1 "${projections[@]}" "$@"
in_turn "$here/xmoe.sh" "$@"
NAME=xmoe-projections in_turn "$here/xmoe.sh" "${projections[@]}" "$@"
NAME=mhmoe-no-splitting in_turn "$here/mhmoe.sh" --mhmoe-no-split "$@"
NAME=mhmoe-no-projections in_turn "$here/mhmoe.sh" --mhmoe-projection-layers 0 "$@"
in_turn "$here/mhmoe.sh" "$@"
finish_all
compare "$OUT/table6-components.md" dense dense-projections xmoe xmoe-projections \
    mhmoe-no-splitting mhmoe-no-projections "mhmoe-${BUDGET:-params}"
