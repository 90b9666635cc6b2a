#!/usr/bin/env bash
# Writes constraints/pyXYZ.txt from a working environment: scripts/update_constraints.sh VENV
# Run the whole test suite in that environment first: these versions are what `make setup` installs.
set -euo pipefail

venv=${1:?usage: scripts/update_constraints.sh VENV}
cd "$(dirname "$0")/.."
version=$("$venv/bin/python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
out=constraints/py$version.txt

{
    echo "# Tested together on Python ${version:0:1}.${version:1}; written by scripts/update_constraints.sh."
    # torch pins its own CUDA libraries and triton, and a CPU build of torch has none of them.
    {
        "$venv/bin/python" -m pip freeze --all --exclude-editable --exclude mhmoe-fairseq |
            grep -E '^[A-Za-z0-9_.-]+==' | grep -v -i -E '^(pip|triton|nvidia-|cuda-)' | sed 's/+[a-z0-9.]*$//'
        # Optional extras that the environment need not hold.
        for pin in tiktoken==0.14.0 lm_eval==0.4.13 pycocoevalcap==1.2 pycocotools==2.0.11 transformers==5.23.0 \
            tokenizers==0.23.3 accelerate==1.15.0 psutil==7.2.2 \
            safetensors==0.8.0; do
            "$venv/bin/python" -m pip show -q "${pin%%==*}" 2>/dev/null || echo "$pin"
        done
    } | sort -f
} >"$out.tmp"
mv "$out.tmp" "$out"
echo "wrote $out ($(grep -c == "$out") pins)"
