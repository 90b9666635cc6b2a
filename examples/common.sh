# shellcheck shell=bash
# What the recipes share; each experiment's common.sh sources it, after setting
#   experiment (its folder), task (flags for training and evaluation), DATA and OUT, and, where evaluation has more than
#   one figure (a language's, a modality's), several_figures.
#   family (lm) of the architectures; criterion (moe_cross_entropy); inputs (flags: what a sample is), schedule (flags: of the learning rate), settings
#   (more flags of training; they win) and cpu_batch and paper_batch (samples of an update at either scale)
#   where a language model's do not fit; keep, how many of a training's checkpoints stay beside best and last (1; -1 for
#   all). Fine-tuning sets started_from, the checkpoint that it starts from: of another one a run starts afresh.
#
#   SCALE=cpu|paper  cpu (default): 4 layers of 128, minutes on two cores; paper: the paper's settings, for GPUs
#   DATA=DIR         prepared corpus (default: the experiment's, see its prepare.sh)
#   OUT=DIR          folder of the runs (default outputs/EXPERIMENT)
#   EXPERTS=N        X-MoE's experts (8); HEADS=N MH-MoE's heads (4)
#   BUDGET=params|flops  what MH-MoE keeps of X-MoE: its parameters (the paper's tables; default), or its FLOPs and
#                    parameters (the second paper's rule)
#   UPDATES=N SEED=N LR=X TOKENS=N    other than the scale's; TOKENS is the length of a block
#   NPROC=N          processes on this machine (cpu: 1; paper: 8, one for each GPU), connected by torchrun
#   NNODES=N NODE_RANK=N MASTER_ADDR=HOST MASTER_PORT=N
#                    machines (1), this one's number from 0, name and port (29500) of number 0; start a recipe on each
#   JOBS=N           runs at the same time, with one thread each, where a recipe has several (1; SCALE=cpu alone)
#   INTERVALS=N      how often a training is validated and saved (cpu: 4; paper: 50)
#   BATCH=N          blocks per process and step (cpu: all of the update's; paper: 4). An update has 16 blocks (paper:
#                    256) however many processes share it: --update-freq is 16 / (NPROC x NNODES x BATCH).
#                    A block is a sample: of language models TOKENS tokens, of others see the experiment's README
#   DRY_RUN=1        print the commands, run nothing
#
# Flags after a recipe's name are added to its fairseq-train command. A finished run is kept, a killed one resumes.
# shellcheck disable=SC2154  # experiment and task are the sourcing file's
set -euo pipefail

: "${family:=lm}" "${criterion:=moe_cross_entropy}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$experiment
user_dir=$(cd "$here/../.." && pwd)/mhmoe_fairseq

fail() {
    echo "$(basename "$0"): error: $*" >&2
    exit 1
}
say() { echo "[$(date +%T)] $*"; }
positive() { # NAME VALUE
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 ($2) must be a positive integer"
}

# Sets size (the architectures' last word), blocks (what training and evaluation share), recipe (the rest of training)
# and what share_update sets.
# shellcheck disable=SC2034  # size is the recipes'
settings_of() { # SCALE
    local tokens lr warmup intervals per_update
    positive UPDATES "${UPDATES:-1}"
    positive TOKENS "${TOKENS:-1}"
    positive INTERVALS "${INTERVALS:-1}"
    positive JOBS "${JOBS:=1}"
    ((JOBS == 1)) || [[ $1 == cpu && ${NNODES:-1} == 1 ]] ||
        fail "JOBS ($JOBS) must be 1 on several machines and at paper scale, where a run takes all GPUs"
    recipe=()
    case $1 in
    cpu)
        size=tiny updates=${UPDATES:-300} lr=${LR:-8e-3} tokens=${TOKENS:-128}
        warmup=$((updates / 10)) intervals=${INTERVALS:-4}
        recipe+=(--clip-norm 1.0)
        per_update=${cpu_batch:-16} nproc=${NPROC:-1} batch=${BATCH:-} backend=gloo
        ;;
    paper)
        size=base updates=${UPDATES:-250000} lr=${LR:-5e-4} tokens=${TOKENS:-4096}
        warmup=$((updates < 25000 ? updates / 10 : 10000)) intervals=${INTERVALS:-50}
        recipe+=(--mhmoe-precision bf16)
        per_update=${paper_batch:-256} nproc=${NPROC:-8} batch=${BATCH:-4} backend=nccl
        ;;
    *) fail "SCALE ($1) must be cpu or paper" ;;
    esac
    meeting_of_nodes
    share_update "$per_update"
    [[ -n ${inputs[*]-} ]] || inputs=(--tokens-per-sample "$tokens" --sample-break-mode none)
    blocks=(--user-dir "$user_dir" "${task[@]}" "${inputs[@]}")
    [[ $1 == paper ]] || blocks+=(--cpu)
    [[ -n ${schedule[*]-} ]] || schedule=(--lr-scheduler polynomial_decay --total-num-update "$updates")
    local interval=$(((updates + intervals - 1) / intervals))
    recipe+=(
        --criterion "$criterion" --moe-gate-loss-wt 0.01
        --optimizer mhmoe_adam --adam-betas "(0.9, 0.98)" --adam-eps 1e-6 --weight-decay 0.01 --dropout 0.1
        --lr "$lr" "${schedule[@]}" --warmup-updates "$warmup"
        --max-update "$updates" --required-batch-size-multiple 1 --seed "${SEED:-1}" --num-workers 0
        --validate-interval-updates "$interval" --save-interval-updates "$interval" --keep-interval-updates "${keep:-1}"
        --no-epoch-checkpoints --log-format json --log-interval $(((interval + 4) / 5))
    )
    recipe+=(${settings[@]+"${settings[@]}"})
}

# Shares an update out: sets launcher (what starts training), sharing (blocks per process and step, steps per update,
# and how the processes work together) and alone (the same update in one process).
share_update() { # BLOCKS_PER_UPDATE
    positive NPROC "$nproc"
    positive NNODES "${NNODES:=1}"
    positive BATCH "${batch:-1}"
    local processes=$((nproc * NNODES))
    (($1 % (processes * ${batch:-1}) == 0)) ||
        fail "NPROC ($nproc) x NNODES ($NNODES) x BATCH (${batch:-1}) must divide $1, the blocks of an update"
    local own=${batch:-$(($1 / processes))} whole=${batch:-$1}
    alone=(--batch-size "$whole" --update-freq "$(($1 / whole))")
    sharing=(--batch-size "$own" --update-freq "$(($1 / (processes * own)))")
    if ((processes == 1)); then
        launcher=(fairseq-train)
        sharing+=(--distributed-world-size 1) # not one process for each GPU, fairseq's default
        return
    fi
    launcher=(torchrun --standalone --nproc_per_node "$nproc" -m fairseq_cli.train)
    ((NNODES == 1)) || launcher=(torchrun "${nodes[@]}" --nproc_per_node "$nproc" -m fairseq_cli.train)
    sharing+=(--ddp-backend legacy_ddp --distributed-backend "$backend")
}

# Where the machines meet, for torchrun; sets nodes.
meeting_of_nodes() {
    nodes=()
    ((${NNODES:-1} > 1)) || return 0
    if ! [[ ${NODE_RANK:-} =~ ^[0-9]+$ ]] || ((NODE_RANK >= NNODES)); then
        fail "NODE_RANK (${NODE_RANK:-}) must be this machine's number, 0 to NNODES - 1 ($((NNODES - 1)))"
    fi
    [[ -n ${MASTER_ADDR:-} ]] || fail "MASTER_ADDR must be the name of machine 0 when NNODES is $NNODES"
    positive MASTER_PORT "${MASTER_PORT:=29500}"
    nodes=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
}

# fairseq-train's JSON records as one short line each, which names the run if there are several.
show_progress() { # NAME
    local run=""
    ((JOBS == 1)) || run="$1, "
    sed -un \
        -e 's|.*"valid_ppl": "\([^"]*\)".*"valid_num_updates": "\([^"]*\)".*|    '"$run"'update \2: validation perplexity \1|p' \
        -e 's|.*"loss": "\([^"]*\)".*"wps": "\([^"]*\)".*"num_updates": "\([^"]*\)".*|    '"$run"'update \3: loss \1 bits, \2 tokens/s|p'
}

# in_turn COMMAND...: now or, if JOBS commands are running, when one of them has ended. finish_all: until all have ended;
# a failure ends the recipe.
in_turn() {
    if ((JOBS == 1)) || [[ -n ${DRY_RUN:-} ]]; then
        "$@"
        return
    fi
    trap 'trap - INT; kill 0' INT # background jobs do not hear Ctrl-C
    while (($(jobs -pr | wc -l) >= JOBS)); do sleep 0.5; done
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$@" &
    processes+=($!)
}
finish_all() {
    local process status=0
    for process in ${processes[@]+"${processes[@]}"}; do wait "$process" || status=1; done
    processes=()
    ((status == 0)) || exit 1
}
processes=()

# The last name's model is the largest: of several at the same time it starts first.
for_each() { # FUNCTION NAME...
    local each=$1 place
    shift
    if ((JOBS == 1)); then
        for ((place = 1; place <= $#; place++)); do "$each" "${!place}"; done
    else
        for ((place = $#; place > 0; place--)); do in_turn "$each" "${!place}"; done
        finish_all
    fi
}

# train NAME FLAGS...: into $OUT/NAME; skipped if finished, resumed if cut off, afresh if command or data have changed.
# command.txt keeps the command for one process: a run may go on with another number of processes.
train() {
    local name=$1 run=$OUT/$1
    shift
    local words=("$DATA" "${blocks[@]}" "${recipe[@]}") last=("$@" --save-dir "$run" --log-file "$run/train.log")
    local command=("${launcher[@]}" "${words[@]}" "${sharing[@]}" "${last[@]}")
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "${command[@]}" && echo
        return
    fi
    [[ -f $DATA/dict.txt ]] || fail "DATA ($DATA) holds no prepared corpus: run examples/$experiment/prepare.sh $DATA"
    local line output=$run/output.txt
    line=$(printf '%q ' fairseq-train "${words[@]}" "${alone[@]}" "${last[@]}")
    if [[ -e $run/finished ]] && is_same_run "$run" "$line"; then
        say "$name: already trained"
        return
    fi
    if ((${NODE_RANK:-0} == 0)); then
        open_run "$run" "$line"
    else
        mkdir -p "$run" && output=$run/output-node$NODE_RANK.txt
    fi
    say "$name: training, $updates updates"
    "${command[@]}" 2>&1 | tee -a "$output" | show_progress "$name" ||
        fail "training of $name failed: $(reason "$output") (see $output)"
    touch "$run/finished"
}

# The run's folder, new if command or data have changed.
open_run() { # RUN LINE
    if [[ -d $1 ]] && ! is_same_run "$@"; then
        say "$(basename "$1"): command, data or start have changed, starting afresh"
        rm -rf "$1"
    fi
    mkdir -p "$1"
    echo "$2" >"$1/command.txt"
    [[ -z ${started_from:-} ]] || sha256_of "$started_from" >"$1/started_from.sha256"
    [[ ! -f $DATA/manifest.json ]] || cp "$DATA/manifest.json" "$1/manifest.json"
}

is_same_run() { # RUN LINE
    [[ $(cat "$1/command.txt" 2>/dev/null) == "$2" ]] && same_data "$1" && same_start "$1"
}

same_start() { # RUN
    [[ -z ${started_from:-} || $(cat "$1/started_from.sha256" 2>/dev/null) == "$(sha256_of "$started_from")" ]]
}

sha256_of() { # FILE
    { sha256sum "$1" 2>/dev/null || shasum -a 256 "$1"; } | cut -d ' ' -f 1
}

# The last error in an output: of several processes, not one that another's end has caused, nor torchrun's summary.
reason() { # FILE
    grep -E '^(\[rank[0-9]+\]: )?[[:alnum:]_.]+(Error|Exception|Interrupt)\b' "$1" | grep -v -e ChildFailedError -e 'by peer' | tail -n 1 |
        grep . || tail -n 1 "$1"
}

same_data() { # RUN
    [[ ! -f $DATA/manifest.json ]] || cmp -s "$DATA/manifest.json" "$1/manifest.json"
}

# evaluate NAME SPLIT: the best checkpoint's perplexity, kept in eval-SPLIT.log (and in parts in eval-SPLIT.json).
evaluate() {
    local name=$1 run=$OUT/$1 split=$2
    local log=$run/eval-$split.log checkpoint=$run/checkpoint_best.pt command
    if [[ -n ${several_figures:-} ]]; then
        command=(mhmoe evaluate "$checkpoint" --data "$DATA" --split "$split" --json "$run/eval-$split.json")
        [[ -z ${LANGS:-} ]] || command+=(--langs "$LANGS")
    else
        command=(
            fairseq-eval-lm "$DATA" "${blocks[@]}" --path "$checkpoint" --gen-subset "$split"
            --batch-size "${EVAL_BATCH:-32}" --distributed-world-size 1
        )
    fi
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "${command[@]}" && echo
        return
    fi
    if [[ ! -e $log ]]; then
        [[ -e $checkpoint ]] || fail "$run has no checkpoint_best.pt: train it first"
        "${command[@]}" >"$log.tmp" 2>&1 ||
            fail "evaluation of $name on $split failed: $(tail -n 1 "$log.tmp") (see $log.tmp)"
        mv "$log.tmp" "$log"
    fi
    say "$name, $split: $(sed -n -e 's/.*\(Loss (base 2).*\)/\1/p' -e 's/^| total | //p' \
        -e 's/^| all  *| *\([0-9,]*\) | *[0-9.,]* | *\([0-9.,]*\) .*/perplexity \2 of \1 masked positions/p' "$log")"
}

# compare REPORT NAME...: evaluates the runs and writes the report.
compare() {
    local report=$1
    shift
    for_each evaluate_held_out "$@"
    if [[ -z ${DRY_RUN:-} ]]; then
        mhmoe report "${@/#/$OUT/}" --data "$DATA" --out "$report"
    fi
}

evaluate_held_out() { # NAME
    local split
    for split in valid test; do evaluate "$1" "$split"; done
}

# The three models. MoE is every second layer, top-2. At paper scale the router is the paper's appendix's, at CPU scale
# TorchScale's, as in the study.
train_dense() { # FLAGS...
    train "${NAME:-dense}" --arch "dense_${family}_$size" "$@"
}

train_xmoe() { # FLAGS...
    local moe
    set_moe
    train "${NAME:-xmoe}" --arch "xmoe_${family}_$size" "${moe[@]}" "$@"
}

train_mhmoe() { # FLAGS...
    local budget=${BUDGET:-params} moe
    set_moe
    train "${NAME:-mhmoe-$budget}" --arch "mhmoe_${family}_$size" "${moe[@]}" \
        --mhmoe-heads-number "${HEADS:-4}" --mhmoe-budget "$budget" "$@"
}

# Trains the models of the paper's table 1 that are not trained yet; sets names.
train_table1() { # FLAGS...
    local default=8 experts list
    [[ $SCALE != paper ]] || default="8 32"
    read -r -a list <<<"${EXPERTS_LIST:-$default}"
    names=(dense)
    for experts in "${list[@]}"; do names+=("xmoe-e$experts" "mhmoe-${BUDGET:-params}-e$experts"); done
    flags=("$@")
    for_each train_named "${names[@]}"
}

# Trains a run whose name tells its model, with flags.
train_named() { # NAME
    local EXPERTS=${EXPERTS:-} BUDGET=${BUDGET:-} train
    train=$(training_of "$1")
    read_name "$1"
    NAME=$1 "$train" ${flags[@]+"${flags[@]}"}
}

# The function that trains a run of the recipes, by its name.
training_of() { # NAME
    case $1 in
    dense*) echo train_dense ;;
    xmoe*) echo train_xmoe ;;
    mhmoe*) echo train_mhmoe ;;
    *) fail "$1 must start with dense, xmoe or mhmoe, as the recipes' runs do" ;;
    esac
}

# What a run's name tells of its model, as xmoe-e32 and mhmoe-flops-e8 do: EXPERTS and BUDGET.
read_name() { # NAME
    if [[ $1 =~ -e([0-9]+)$ ]]; then EXPERTS=${BASH_REMATCH[1]}; fi
    if [[ $1 =~ ^mhmoe-(params|flops) ]]; then BUDGET=${BASH_REMATCH[1]}; fi
}

set_moe() {
    moe=(--moe-freq 2 --moe-top-k 2 --moe-expert-count "${EXPERTS:-8}")
    [[ $SCALE != paper ]] || moe+=(--mhmoe-router-preset p1)
}

SCALE=${SCALE:-cpu}
settings_of "$SCALE"
