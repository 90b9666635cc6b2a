#!/usr/bin/env bash
# The paper's table 4: the models of table 1 with 8 experts (pre-trained if one is missing), fine-tuned on questions,
# statements and captions, and a table of their scores beside those of guessing without the image, and the paper's.
#   examples/masked_multimodal/table4.sh [NAME...]        models (default: dense, xmoe-e8 and mhmoe-params-e8)
# Captions are the slowest to score: CAPTIONED="dense mhmoe-params-e8" (the default) are the models that write them.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${OUT:-outputs/masked_multimodal}

(($#)) || set -- dense xmoe-e8 "mhmoe-${BUDGET:-params}-e8"
read -r -a captioned <<<"${CAPTIONED:-dense mhmoe-${BUDGET:-params}-e8}"
if [[ ${START:-pretraining} != pretraining ]]; then
    echo "table4.sh: error: START ($START) must be pretraining, if it is given: no task can start from itself" >&2
    exit 1
fi
if [[ " ${EXPERTS_LIST:-8} " != *" 8 "* ]]; then
    echo "table4.sh: error: EXPERTS_LIST ($EXPERTS_LIST) must contain 8, the experts of the paper's table 4" >&2
    exit 1
fi
# Models that are there are taken as they are, with whatever flags they were trained.
is_missing=${DRY_RUN:-}
for name in "$@"; do [[ -e $out/$name/checkpoint_best.pt ]] || is_missing=1; done
[[ -z $is_missing ]] || "$here/table1_multimodal.sh"
for task in vqa nlvr2; do "$here/finetune.sh" "$task" "$@"; done
"$here/finetune.sh" captioning "${captioned[@]}"
command=("${MHMOE:-mhmoe}" report-tasks "$out" --names "$@" --out "$out/table4.md")
if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}" && echo
else
    "${command[@]}"
fi
