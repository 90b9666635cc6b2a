#!/usr/bin/env bash
# The dense baseline. See common.sh and ../common.sh for SCALE, DATA, ...; flags go to fairseq-train.
set -euo pipefail
# shellcheck source=examples/masked_multimodal/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train_dense "$@"
