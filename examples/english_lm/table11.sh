#!/usr/bin/env bash
# The paper's table 11: numbers of parameters, counted beside the paper's. Flags: mhmoe reproduce --help
exec mhmoe reproduce table11 "$@"
