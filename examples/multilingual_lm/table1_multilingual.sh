#!/usr/bin/env bash
# The paper's table 1, multilingual block: the three models with each of EXPERTS_LIST (default "8"; the paper: "8 32"),
# and a report that ends with the paper's figures. See common.sh and ../common.sh for the settings.
set -euo pipefail
# shellcheck source=examples/multilingual_lm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

default=8
[[ $SCALE != paper ]] || default="8 32"
read -r -a list <<<"${EXPERTS_LIST:-$default}"
budget=${BUDGET:-params}
names=(dense)
"$here/dense.sh" "$@"
for experts in "${list[@]}"; do
    names+=("xmoe-e$experts" "mhmoe-$budget-e$experts")
    EXPERTS=$experts NAME=xmoe-e$experts "$here/xmoe.sh" "$@"
    EXPERTS=$experts NAME=mhmoe-$budget-e$experts "$here/mhmoe.sh" "$@"
done
compare "$OUT/table1-multilingual.md" "${names[@]}"
