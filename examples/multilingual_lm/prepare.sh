#!/usr/bin/env bash
# Prepares text in the paper's 14 languages for multilingual language modelling.
#   examples/multilingual_lm/prepare.sh [DEST] [flags of `mhmoe prepare multilingual`]
# Without flags: documentation and translations from Debian's packages (needs apt-get; fetched, not installed).
# Your own text: --source text DIR (DIR/de.txt, DIR/fr/*.txt, ...) | jsonl DIR
set -euo pipefail

dest="${1:-data/multilingual}"
shift || true
exec mhmoe prepare multilingual --dest "$dest" "$@"
