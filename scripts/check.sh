#!/usr/bin/env bash
# Linters, types, layering and shell scripts; expects the environment's bin folder on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "check: ruff"
ruff check .
echo "check: mypy"
typed=(mhmoe_fairseq/moe)
[ -d mhmoe_fairseq/parallel ] && typed+=(mhmoe_fairseq/parallel)
mypy "${typed[@]}"
echo "check: shellcheck"
git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck -x
echo "check: layering"
python -m pytest -q tests/test_layering.py
