#!/usr/bin/env bash
# The paper's table 1, multilingual block: the three models with each of EXPERTS_LIST (default "8"; the paper: "8 32"),
# and a report that ends with the paper's figures. See common.sh and ../common.sh for the settings.
set -euo pipefail
# shellcheck source=examples/multilingual_lm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train_table1 "$@"
compare "$OUT/table1-multilingual.md" "${names[@]}"
