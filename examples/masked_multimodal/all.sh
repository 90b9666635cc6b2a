#!/usr/bin/env bash
# The whole experiment in one command: data and visual tokenizer (at CPU scale, where DATA is not there yet), the paper's
# tables 1 and 4, figures 8 and 10; at CPU scale as many runs at the same time as there are cores. See common.sh and ../common.sh for the settings. What is finished is kept, so a run
# that was cut off goes on.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=${DATA:-data/image-text}

[[ ${SCALE:-cpu} == paper ]] || export JOBS="${JOBS:-$(getconf _NPROCESSORS_ONLN)}"
prepare=(mhmoe prepare image-text --dest "$data" --image-size "${IMG_SIZE:-64}" --patch-size "${PATCH_SIZE:-16}")
if [[ ${SCALE:-cpu} == paper ]]; then
    : # the paper's pictures are the user's to fetch: see README.md
elif [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${prepare[@]}" && echo
elif [[ ! -e $data/dict.txt ]]; then
    "${prepare[@]}"
fi
"$here/table1_multimodal.sh" --keep-interval-updates -1 # what figure 8 shows
PRETRAINED=1 "$here/table4.sh"
RUN=mhmoe-${BUDGET:-params}-e8 "$here/figure8.sh"
