#!/usr/bin/env bash
# MH-MoE: HEADS heads (default 4) and the BUDGET (default params) of X-MoE with EXPERTS experts (default 8).
# See common.sh and ../common.sh for the rest.
set -euo pipefail
# shellcheck source=examples/masked_multimodal/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train_mhmoe "$@"
