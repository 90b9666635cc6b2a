#!/usr/bin/env bash
# The paper's table 5: the number of heads, against X-MoE. HEADS_LIST="2 4 8" chooses; all other settings of mhmoe.sh.
set -euo pipefail
# shellcheck source=examples/english_lm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# At the paper's width 2, 4, 6, 8 and 12 heads; the CPU scale's 128 is not divided by 6 and 12.
default="2 4 8 16"
[[ $SCALE != paper ]] || default="2 4 6 8 12"
read -r -a list <<<"${HEADS_LIST:-$default}"
budget=${BUDGET:-params}
names=(xmoe)
in_turn "$here/xmoe.sh" "$@"
for heads in "${list[@]}"; do
    names+=("mhmoe-$budget-h$heads")
    HEADS=$heads NAME=mhmoe-$budget-h$heads in_turn "$here/mhmoe.sh" "$@"
done
finish_all
compare "$OUT/table5-heads.md" "${names[@]}"
