#!/usr/bin/env bash
# The second paper's table 3 trained as BitNet was, in two stages. Flags: mhmoe reproduce --help
exec mhmoe reproduce p2-table3-two-stage "$@"
