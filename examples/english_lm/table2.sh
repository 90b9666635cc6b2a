#!/usr/bin/env bash
# The paper's table 2: zero-shot English tasks of table 1's models, eight of nine. Flags: mhmoe reproduce --help
exec mhmoe reproduce table2 "$@"
