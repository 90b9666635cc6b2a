#!/usr/bin/env bash
# Linters, types, layering and shell scripts; expects the environment's bin folder on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "check: ruff"
ruff check .
echo "check: mypy"
mypy mhmoe_fairseq
echo "check: shellcheck"
git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck -x
echo "check: layering"
python -m pytest -q tests/test_layering.py
echo "check: results are what their records give"
python -m mhmoe_fairseq reproduce --report --check
echo "check: API reference"
api=$(mktemp -d)
trap 'rm -rf "$api"' EXIT
bash scripts/docs.sh "$api" >/dev/null
