#!/usr/bin/env bash
# The paper's table 6: what the projections and the splitting are worth. Flags: mhmoe reproduce --help
exec mhmoe reproduce table6 "$@"
