#!/usr/bin/env bash
# The second paper's table 4: head and merge layers in every sparse model. Flags: mhmoe reproduce --help
exec mhmoe reproduce p2-table4 "$@"
