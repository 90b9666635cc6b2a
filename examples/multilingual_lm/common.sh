# shellcheck shell=bash
# Multilingual language modelling: what ../common.sh needs to know of it; sourced, not run. Beside its settings:
#
#   LANGS=de,fr,...  languages to train on or to evaluate (default: all that are prepared)
#   ALPHA=X          languages are drawn with probability ~ (share of the data)^X (default 0.5; 1: as the data are)
# shellcheck disable=SC2034  # all are read by ../common.sh
experiment=multilingual_lm
by_language=1
task=(--task mhmoe_multilingual_language_modeling --multilang-sampling-alpha "${ALPHA:-0.5}")
[[ -z ${LANGS:-} ]] || task+=(--langs "$LANGS")
DATA=${DATA:-data/multilingual}
OUT=${OUT:-outputs/multilingual_lm}
# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
