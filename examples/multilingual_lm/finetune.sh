#!/usr/bin/env bash
# Fine-tunes runs in OUT to classify, such as English NLI, and tests in every language that is prepared:
#   CLASSIFICATION=DIR examples/multilingual_lm/finetune.sh [NAME...]     DIR: made by mhmoe prepare classification
# Without names: dense, xmoe and mhmoe-params. HEADS as in their training; EXPERTS and BUDGET, too, where the name does
# not tell them (mhmoe-flops-e32 does). Runs and accuracies (accuracy.txt) go to OUT/finetuned/NAME. Defaults at CPU
# scale: 300 updates of 16 examples, learning rate 1e-3; at paper scale 10000 of 256, 2e-5.
set -euo pipefail
case ${SCALE:-cpu} in
cpu) UPDATES=${UPDATES:-300} LR=${LR:-1e-3} ;;
*) UPDATES=${UPDATES:-10000} LR=${LR:-2e-5} TOKENS=${TOKENS:-256} ;;
esac
# shellcheck source=examples/multilingual_lm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# The training language's validation split chooses the best checkpoint: the others' would be no zero-shot transfer.
validation_split() {
    local train
    train=$(basename "$(find "$CLASSIFICATION/label" -name 'train_*.idx' | sort | head -n 1)" .idx)
    [[ -f $CLASSIFICATION/label/valid_${train#train_}.idx ]] ||
        fail "CLASSIFICATION ($CLASSIFICATION) has no validation split of the language of $train"
    echo "valid_${train#train_}"
}

# Another task on other data; the models and the rest of the settings stay those of ../common.sh.
turn_to_classification() {
    local split=valid_en
    if [[ -z ${DRY_RUN:-} ]]; then
        [[ -d ${CLASSIFICATION:-}/label ]] ||
            fail "CLASSIFICATION (${CLASSIFICATION:-}) must be a folder made by mhmoe prepare classification"
        split=$(validation_split)
    fi
    language_models=$OUT DATA=${CLASSIFICATION:-CLASSIFICATION} OUT=$OUT/finetuned
    task=(--task mhmoe_sentence_classification) inputs=(--tokens-per-sample "${TOKENS:-128}")
    criterion=mhmoe_sentence_classification
    settings=(
        --valid-subset "$split" --best-checkpoint-metric accuracy --maximize-best-checkpoint-metric
    )
    settings_of "$SCALE"
}

finetune() { # NAME
    local from=$language_models/$1/checkpoint_best.pt run=$OUT/$1 flags
    flags=(--finetune-from-model "$from")
    [[ -n ${DRY_RUN:-} || -e $from ]] || fail "$from is missing: train it first"
    started_from=$from
    train_named "$1"
    [[ -z ${DRY_RUN:-} ]] || return 0
    local command=(mhmoe classify "$run/checkpoint_best.pt")
    [[ $SCALE == paper ]] || command+=(--cpu)
    "${command[@]}" | tee "$run/accuracy.txt.tmp" | sed "s/^/    $1, /"
    mv "$run/accuracy.txt.tmp" "$run/accuracy.txt"
}

(($#)) || set -- dense xmoe mhmoe-params
turn_to_classification
for_each finetune "$@"
