#!/usr/bin/env bash
# The paper's table 1, multimodal block: the three models with each of EXPERTS_LIST (default "8"; the paper: "8 32"),
# and a report that ends with the paper's figures. See common.sh and ../common.sh for the settings.
set -euo pipefail
# shellcheck source=examples/masked_multimodal/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train_table1 "$@"
compare "$OUT/table1-multimodal.md" "${names[@]}"
