#!/usr/bin/env bash
# The paper's table 7: 0 to 3 layers in each projection, ReLU between them. See ../common.sh for the settings.
set -euo pipefail
# shellcheck source=examples/english_lm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

names=()
for layers in 0 1 2 3; do
    names+=("mhmoe-projections-$layers")
    NAME=mhmoe-projections-$layers in_turn "$here/mhmoe.sh" --mhmoe-projection-layers "$layers" "$@"
done
finish_all
compare "$OUT/table7-projection-layers.md" "${names[@]}"
