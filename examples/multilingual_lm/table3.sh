#!/usr/bin/env bash
# The paper's table 3: zero-shot XNLI of table 1's models; table3.sh --xnli DIR. Flags: mhmoe reproduce --help
exec mhmoe reproduce table3 "$@"
