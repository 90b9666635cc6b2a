#!/usr/bin/env bash
# Prepares images, texts and pairs of both, and fits the visual tokenizer.
#   examples/masked_multimodal/prepare.sh [DEST] [flags of `mhmoe prepare image-text`]
# Without flags: emoji images with their CLDR names, and questions and statements derived from their metadata.
# Your own: --source folder DIR | beit3-index DIR (what unilm's BEiT-3 scripts made of COCO, VQAv2, NLVR2, ...)
set -euo pipefail

dest="${1:-data/image-text}"
shift || true
exec mhmoe prepare image-text --dest "$dest" "$@"
