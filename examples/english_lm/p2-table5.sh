#!/usr/bin/env bash
# The second paper's table 5: head and merge layers one by one. Flags: mhmoe reproduce --help
exec mhmoe reproduce p2-table5 "$@"
