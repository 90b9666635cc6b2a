#!/usr/bin/env bash
# The paper's table 5: the number of heads, against X-MoE. Flags: mhmoe reproduce --help
exec mhmoe reproduce table5 "$@"
