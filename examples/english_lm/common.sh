# shellcheck shell=bash
# What the recipes and scripts/demo.sh share; sourced, not run.
#
#   SCALE=cpu|paper  cpu (default): 4 layers of 128, minutes on two cores; paper: the paper's settings, for GPUs
#   DATA=DIR         prepared corpus (default data/web-bible, see prepare.sh)
#   OUT=DIR          folder of the runs (default outputs/english_lm)
#   UPDATES=N SEED=N LR=X TOKENS=N    other than the scale's; TOKENS is the length of a block
#   GPUS=N BATCH=N   paper scale: number of GPUs (8) and blocks per GPU and step (4); 256 blocks per update
#   DRY_RUN=1        print the commands, run nothing
#
# Flags after a recipe's name are added to its fairseq-train command. A finished run is kept, a killed one resumes.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
user_dir=$(dirname "$(dirname "$here")")/mhmoe_fairseq

fail() {
    echo "$(basename "$0"): error: $*" >&2
    exit 1
}
say() { echo "[$(date +%T)] $*"; }
positive() { # NAME VALUE
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 ($2) must be a positive integer"
}

# Sets size (the architectures' last word), blocks (what training and evaluation share) and recipe (the rest of training).
# shellcheck disable=SC2034  # size is the recipes'
settings_of() { # SCALE
    local blocks_per_step=16 updates_per_step=1 tokens lr warmup intervals
    positive UPDATES "${UPDATES:-1}"
    positive TOKENS "${TOKENS:-1}"
    recipe=()
    case $1 in
    cpu)
        size=tiny updates=${UPDATES:-300} lr=${LR:-8e-3} tokens=${TOKENS:-128}
        warmup=$((updates / 10)) intervals=4
        recipe+=(--clip-norm 1.0)
        ;;
    paper)
        size=base updates=${UPDATES:-250000} lr=${LR:-5e-4} tokens=${TOKENS:-4096}
        warmup=$((updates < 25000 ? updates / 10 : 10000)) intervals=50
        positive GPUS "${GPUS:=8}"
        positive BATCH "${BATCH:=4}"
        blocks_per_step=$BATCH updates_per_step=$((256 / (GPUS * BATCH)))
        ((GPUS * BATCH * updates_per_step == 256)) || fail "GPUS ($GPUS) x BATCH ($BATCH) must divide 256"
        recipe+=(--mhmoe-precision bf16 --ddp-backend legacy_ddp)
        ;;
    *) fail "SCALE ($1) must be cpu or paper" ;;
    esac
    blocks=(--user-dir "$user_dir" --task mhmoe_language_modeling --tokens-per-sample "$tokens" --sample-break-mode none)
    [[ $1 == paper ]] || blocks+=(--cpu)
    local interval=$(((updates + intervals - 1) / intervals))
    recipe+=(
        --criterion moe_cross_entropy --moe-gate-loss-wt 0.01
        --optimizer adam --adam-betas "(0.9, 0.98)" --adam-eps 1e-6 --weight-decay 0.01 --dropout 0.1
        --lr "$lr" --lr-scheduler polynomial_decay --warmup-updates "$warmup" --total-num-update "$updates"
        --max-update "$updates" --batch-size "$blocks_per_step" --update-freq "$updates_per_step"
        --required-batch-size-multiple 1 --seed "${SEED:-1}" --num-workers 0
        --validate-interval-updates "$interval" --save-interval-updates "$interval" --keep-interval-updates 1
        --no-epoch-checkpoints --log-format json --log-interval $(((interval + 4) / 5))
    )
}

# fairseq-train's JSON records as one short line each.
show_progress() {
    sed -un \
        -e 's|.*"valid_ppl": "\([^"]*\)".*"valid_num_updates": "\([^"]*\)".*|    update \2: validation perplexity \1|p' \
        -e 's|.*"loss": "\([^"]*\)".*"wps": "\([^"]*\)".*"num_updates": "\([^"]*\)".*|    update \3: loss \1 bits, \2 tokens/s|p'
}

# train NAME FLAGS...: into $OUT/NAME; skipped if finished, resumed if cut off, afresh if command or data have changed.
train() {
    local name=$1 run=$OUT/$1
    shift
    local command=(fairseq-train "$DATA" "${blocks[@]}" "${recipe[@]}" "$@" --save-dir "$run" --log-file "$run/train.log")
    local line
    line=$(printf '%q ' "${command[@]}")
    if [[ -n ${DRY_RUN:-} ]]; then
        echo "$line"
        return
    fi
    [[ -f $DATA/dict.txt ]] || fail "DATA ($DATA) holds no prepared corpus: run examples/english_lm/prepare.sh $DATA"
    if [[ -d $run ]] && ! { [[ $(cat "$run/command.txt" 2>/dev/null) == "$line" ]] && same_data "$run"; }; then
        say "$name: command or data have changed, starting afresh"
        rm -rf "$run"
    fi
    if [[ -e $run/finished ]]; then
        say "$name: already trained"
        return
    fi
    mkdir -p "$run"
    echo "$line" >"$run/command.txt"
    [[ ! -f $DATA/manifest.json ]] || cp "$DATA/manifest.json" "$run/manifest.json"
    say "$name: training, $updates updates"
    "${command[@]}" 2>&1 | tee -a "$run/output.txt" | show_progress ||
        fail "training of $name failed: $(tail -n 1 "$run/output.txt") (see $run/output.txt)"
    touch "$run/finished"
}

same_data() { # RUN
    [[ ! -f $DATA/manifest.json ]] || cmp -s "$DATA/manifest.json" "$1/manifest.json"
}

# evaluate NAME SPLIT: fairseq-eval-lm of the best checkpoint, kept in eval-SPLIT.log.
evaluate() {
    local name=$1 run=$OUT/$1 split=$2
    local log=$run/eval-$split.log
    local command=(
        fairseq-eval-lm "$DATA" "${blocks[@]}" --path "$run/checkpoint_best.pt" --gen-subset "$split"
        --batch-size "${EVAL_BATCH:-32}"
    )
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "${command[@]}" && echo
        return
    fi
    if [[ ! -e $log ]]; then
        [[ -e $run/checkpoint_best.pt ]] || fail "$run has no checkpoint_best.pt: train it first"
        "${command[@]}" >"$log.tmp" 2>&1 ||
            fail "evaluation of $name on $split failed: $(tail -n 1 "$log.tmp") (see $log.tmp)"
        mv "$log.tmp" "$log"
    fi
    say "$name, $split: $(sed -n 's/.*\(Loss (base 2).*\)/\1/p' "$log")"
}

# compare REPORT NAME...: evaluates the runs and writes the report.
compare() {
    local report=$1 name split
    shift
    for name in "$@"; do
        for split in valid test; do evaluate "$name" "$split"; done
    done
    if [[ -z ${DRY_RUN:-} ]]; then
        mhmoe report "${@/#/$OUT/}" --data "$DATA" --out "$report"
    fi
}

DATA=${DATA:-data/web-bible}
OUT=${OUT:-outputs/english_lm}
SCALE=${SCALE:-cpu}
settings_of "$SCALE"
