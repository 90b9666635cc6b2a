# shellcheck shell=bash
# English language modelling: what ../common.sh needs to know of it; sourced, not run. The settings are described there.
# shellcheck disable=SC2034  # all are read by ../common.sh
experiment=english_lm
task=(--task mhmoe_language_modeling)
DATA=${DATA:-data/web-bible}
OUT=${OUT:-outputs/english_lm}
# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
