#!/usr/bin/env bash
# The second paper's table 2: one shared expert. Flags: mhmoe reproduce --help
exec mhmoe reproduce p2-table2 "$@"
