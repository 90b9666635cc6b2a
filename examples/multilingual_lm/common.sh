# shellcheck shell=bash
# Multilingual language modelling: what ../common.sh needs to know of it; sourced, not run. Beside its settings:
#
#   LANGS=de,fr,...  languages to train on or to evaluate (default: all that are prepared)
#   ALPHA=X          languages are drawn with probability ~ (share of the data)^X (default 0.5; 1: as the data are)
#
# At CPU scale a training is validated twice (INTERVALS=2): 14 languages take as long as a third of the training.
# shellcheck disable=SC2034  # most are read by ../common.sh
experiment=multilingual_lm
several_figures=1
task=(--task mhmoe_multilingual_language_modeling --multilang-sampling-alpha "${ALPHA:-0.5}")
[[ -z ${LANGS:-} ]] || task+=(--langs "$LANGS")
[[ ${SCALE:-cpu} != cpu ]] || INTERVALS=${INTERVALS:-2}
DATA=${DATA:-data/multilingual}
OUT=${OUT:-outputs/multilingual_lm}
# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

require_xnli() {
    [[ -n ${DRY_RUN:-} || -d ${XNLI:-} ]] || fail "XNLI (${XNLI:-}) must be the folder of your copy of XNLI"
}

evaluate_xnli() { # NAME...
    require_xnli
    local command=(mhmoe xnli --checkpoint "${@/#/$OUT/}" --data "$DATA" --xnli-dir "${XNLI:-XNLI}" --out "$OUT/xnli")
    [[ -z ${LANGS:-} ]] || command+=(--langs "$LANGS")
    [[ -z ${LIMIT:-} ]] || command+=(--limit "$LIMIT")
    [[ $SCALE == paper ]] || command+=(--cpu)
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "${command[@]}" && echo
    else
        "${command[@]}"
    fi
}
