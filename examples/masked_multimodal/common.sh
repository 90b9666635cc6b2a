# shellcheck shell=bash
# Masked multimodal modelling: what ../common.sh needs to know of it; sourced, not run. Beside its settings:
#
#   IMG_SIZE=N PATCH_SIZE=N MAX_TEXT=N   (cpu: 64, 16, 32; paper: 224, 16, 64)
#   VISUAL_TOKENIZER=FILE   for pre-training (default: the data's visual_tokenizer.pt)
#
# A block is an image, a text and a pair of both: an update has 16 of each (paper: 512). UPDATES and LR are 600 and 2e-3
# at CPU scale (chosen on the validation part), 250000 and the paper's 2.8e-3 at its own.
# shellcheck disable=SC2034  # most are read by ../common.sh
experiment=masked_multimodal
several_figures=1
family=beit3
criterion=mhmoe_masked_multimodal
paper_batch=512
task=(--task mhmoe_masked_multimodal)
[[ -z ${VISUAL_TOKENIZER:-} ]] || task+=(--visual-tokenizer "$VISUAL_TOKENIZER")
case ${SCALE:-cpu} in
cpu) LR=${LR:-2e-3} UPDATES=${UPDATES:-600} shape=("${IMG_SIZE:-64}" "${PATCH_SIZE:-16}" "${MAX_TEXT:-32}") ;;
*) LR=${LR:-2.8e-3} BATCH=${BATCH:-8} shape=("${IMG_SIZE:-224}" "${PATCH_SIZE:-16}" "${MAX_TEXT:-64}") ;;
esac
inputs=(--img-size "${shape[0]}" --patch-size "${shape[1]}" --max-text-length "${shape[2]}")
schedule=(--lr-scheduler cosine)
settings=(--weight-decay 0.05)
if [[ ${SCALE:-cpu} == cpu ]]; then
    keep=-1 # for figure8.sh
else
    settings+=(--num-workers 8) # images are decoded there
fi
DATA=${DATA:-data/image-text}
OUT=${OUT:-outputs/masked_multimodal}
# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
