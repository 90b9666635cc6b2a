#!/usr/bin/env bash
# Fine-tunes pre-trained runs in OUT on one task and tests them: examples/masked_multimodal/finetune.sh TASK [NAME...]
#   TASK: vqa | nlvr2 | captioning | image_classification | retrieval. Without names: dense, xmoe and mhmoe-params.
# HEADS as in pre-training; EXPERTS and BUDGET, too, where the name does not tell them (mhmoe-flops-e32 does).
# TASK_UPDATES=N TASK_LR=X other than the task's own. START=TASK starts from the run fine-tuned on that task, START=pretraining
# from the pre-trained one: the default but for nlvr2 at CPU scale, which starts from vqa. Runs, predictions and scores go to
# OUT/TASK/NAME. At CPU scale INTERVALS is 2 and an update of nlvr2 has 32 statements. See common.sh and ../common.sh for the rest.
set -euo pipefail

task_name=${1:-}
shift || true
# Paper scale: BEiT-3 base's, as far as its recipes tell (updates: its epochs on VQAv2, NLVR2, COCO, ImageNet); of
# retrieval none is known to us, and the values are our guess. At CPU scale: chosen on the validation part of the emoji
# with the dense model.
side=224 text=64 samples=256 decay=0.05 own=() cpu=(300 1e-3) start=pretraining
case $task_name in
vqa)
    metric=vqa_score paper=(50000 3e-5) side=480 samples=128 decay=0.01
    own=(--head-lr-multiplier 20 --randaug --drop-path-rate 0.1) cpu=(800 1.5e-4 --head-lr-multiplier 20)
    ;;
nlvr2)
    metric=accuracy paper=(6700 7e-4) decay=0.2
    own=(--layer-decay 0.65 --drop-path-rate 0.2) cpu=(600 1e-4 --head-lr-multiplier 10 --center-features) cpu_batch=32
    [[ ${SCALE:-cpu} != cpu ]] || start=vqa
    ;;
captioning) metric=cider paper=(22000 4e-5) side=480 text=32 ;;
image_classification) metric=accuracy paper=(62500 7e-4) samples=1024 own=(--layer-decay 0.65 --imagenet-views) ;;
retrieval) metric=mean_recall paper=(22000 4e-5) ;;
*)
    echo "finetune.sh: error: TASK ($task_name) must be vqa, nlvr2, captioning, image_classification or retrieval" >&2
    exit 1
    ;;
esac
case ${SCALE:-cpu} in
cpu)
    UPDATES=${TASK_UPDATES:-${cpu[0]}} LR=${TASK_LR:-${cpu[1]}} INTERVALS=${INTERVALS:-2}
    decay=0.05 own=(--dropout 0 ${cpu[@]+"${cpu[@]:2}"})
    ;;
*)
    UPDATES=${TASK_UPDATES:-${paper[0]}} LR=${TASK_LR:-${paper[1]}}
    IMG_SIZE=${IMG_SIZE:-$side} MAX_TEXT=${MAX_TEXT:-$text}
    ;;
esac
# shellcheck source=examples/masked_multimodal/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

turn_to_task() {
    origin=$OUT OUT=$OUT/$task_name
    case ${START:=$start} in
    pretraining) remedy="pre-train it" ;;
    vqa | nlvr2 | captioning | image_classification | retrieval) origin+=/$START remedy="fine-tune it on $START" ;;
    *) fail "START ($START) must be pretraining or a task" ;;
    esac
    [[ $START != "$task_name" ]] || fail "START ($START) must not be TASK itself"
    task=(--task "mhmoe_$task_name")
    criterion=mhmoe_$task_name
    settings+=(
        --weight-decay "$decay" ${own[@]+"${own[@]}"}
        --best-checkpoint-metric "$metric" --maximize-best-checkpoint-metric
    )
    paper_batch=$samples
    keep=1
    settings_of "$SCALE"
}

finetune() { # NAME
    local from=$origin/$1/checkpoint_best.pt split flags
    flags=(--finetune-from-model "$from")
    [[ -n ${DRY_RUN:-} || -e $from ]] || fail "$from is missing: $remedy first"
    started_from=$from
    train_named "$1"
    for split in valid test; do score "$1" "$split"; done
}

score() { # NAME SPLIT
    local run=$OUT/$1
    local scores=$run/scores-$2.json command=(mhmoe predict)
    [[ $task_name != captioning ]] || command=(mhmoe caption)
    command+=("$run/checkpoint_best.pt" --data "$DATA" --split "$2")
    command+=(--output "$run/predictions-$2.txt" --scores "$scores")
    [[ $SCALE == paper ]] || command+=(--cpu)
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "${command[@]}" && echo
    elif [[ ! -e $scores ]]; then
        "${command[@]}" | sed "s/^/    $1, /"
    fi
}

(($#)) || set -- dense xmoe mhmoe-params
turn_to_task
for_each finetune "$@"
