#!/usr/bin/env bash
# The second paper's table 1: dense, sparse, fine-grained and MH-MoE at equal FLOPs. Flags: mhmoe reproduce --help
exec mhmoe reproduce p2-table1 "$@"
