#!/usr/bin/env bash
# The second paper's table 3: the models of its table 1 with 1.58-bit weights. Flags: mhmoe reproduce --help
exec mhmoe reproduce p2-table3 "$@"
