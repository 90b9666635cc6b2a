#!/usr/bin/env bash
# The paper's figures 8 and 10: to how many different experts the sub-tokens of each image patch go, over a training of
# MH-MoE that keeps its checkpoints (default: four of them; INTERVALS=N). IMAGES=N of the validation split (default 8).
# RUN=NAME is a run in OUT that kept its checkpoints (--keep-interval-updates -1), in place of a training of its own.
# Overlays and curve go to OUT/figure8.
set -euo pipefail
# shellcheck source=examples/masked_multimodal/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name=${RUN:-figure8-mhmoe-${BUDGET:-params}}
[[ -n ${RUN:-} ]] || NAME=$name train_mhmoe --keep-interval-updates -1 "$@"
command=(mhmoe diversity "$OUT/$name"/checkpoint_*_*.pt --data "$DATA" --images "${IMAGES:-8}" --out "$OUT/figure8")
if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}" && echo
else
    "${command[@]}"
fi
