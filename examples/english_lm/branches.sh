#!/usr/bin/env bash
# Branch-Train-MiX (docs/domains.md): a dense seed, a branch of it for each domain, and a sparse model made of them all.
#   DOMAINS="brown linux" examples/english_lm/branches.sh [flags of every training]; data: mhmoe prepare english --source mix
set -euo pipefail
export DATA=${DATA:-data/mix}
ROOT=${OUT:-outputs/branches} train=$(dirname "$0")/dense.sh branches=()
OUT=$ROOT/seed "$train" "$@"
for domain in ${DOMAINS:-brown gcide linux}; do
    OUT=$ROOT/$domain "$train" --train-subset "train_$domain" --valid-subset "valid_$domain" \
        --finetune-from-model "$ROOT/seed/checkpoint_last.pt" "$@"
    branches+=(--branch "$ROOT/$domain/checkpoint_last.pt")
done
mhmoe checkpoint mix --seed "$ROOT/seed/checkpoint_last.pt" "${branches[@]}" --include-seed --output "$ROOT/mixed.pt"
OUT=$ROOT/mixed "$train" --arch smoe_lm_tiny --moe-freq 1 --moe-expert-count $((${#branches[@]} / 2 + 1)) --moe-top-k 2 \
    --restore-file "$ROOT/mixed.pt" --reset-optimizer --reset-dataloader --reset-meters --reset-lr-scheduler "$@"
