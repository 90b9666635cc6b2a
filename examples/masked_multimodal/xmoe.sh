#!/usr/bin/env bash
# The X-MoE baseline: EXPERTS experts (default 8). See common.sh and ../common.sh for the rest.
set -euo pipefail
# shellcheck source=examples/masked_multimodal/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train_xmoe "$@"
