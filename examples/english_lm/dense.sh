#!/usr/bin/env bash
# The dense baseline. See ../common.sh for SCALE, DATA, OUT, DRY_RUN, ...; flags are passed on to fairseq-train.
set -euo pipefail
# shellcheck source=examples/english_lm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train_dense "$@"
