#!/usr/bin/env bash
# The second paper's table 3: 1.58-bit weights, which no layer here has yet. Flags: mhmoe reproduce --help
exec mhmoe reproduce p2-table3 "$@"
