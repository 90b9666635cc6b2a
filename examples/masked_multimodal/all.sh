#!/usr/bin/env bash
# The whole experiment in one command: data and visual tokenizer (at CPU scale, where DATA is not there yet), the paper's
# tables 1 and 4, figures 8 and 10; at CPU scale as many runs at the same time as there are cores. See common.sh and
# ../common.sh for the settings. What is finished is kept, so a run that was cut off goes on.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=${DATA:-data/image-text}

prepare=("${MHMOE:-mhmoe}" prepare image-text --dest "$data")
prepare+=(--image-size "${IMG_SIZE:-64}" --patch-size "${PATCH_SIZE:-16}")
if [[ ${SCALE:-cpu} == cpu ]]; then
    export JOBS="${JOBS:-$(getconf _NPROCESSORS_ONLN)}"
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "${prepare[@]}" && echo
    elif [[ ! -e $data/manifest.json ]]; then
        "${prepare[@]}"
    fi
    # With X-MoE's parameters alone MH-MoE takes more than twice its time: here it has its FLOPs, too, unless told otherwise.
    export BUDGET=${BUDGET:-flops}
    export RUN=${RUN:-mhmoe-$BUDGET-e8} # table 1's keeps its checkpoints
fi
"$here/table4.sh"
"$here/figure8.sh"
