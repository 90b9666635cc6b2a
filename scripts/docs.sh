#!/usr/bin/env bash
# The API reference as HTML: scripts/docs.sh FOLDER. pdoc's warnings, such as a type that it cannot resolve, are errors.
set -euo pipefail

folder=${1:?usage: scripts/docs.sh FOLDER}
packages=(mhmoe_fairseq.moe mhmoe_fairseq.parallel mhmoe_fairseq.experiments)
said=$(python -m pdoc --docformat google --output-directory "$folder" "${packages[@]}" 2>&1)
if grep "^Warn:" <<<"$said"; then
    echo "docs: error: the warnings above" >&2
    exit 1
fi
echo "docs: $folder/index.html"
