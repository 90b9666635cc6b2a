#!/usr/bin/env bash
# MH-MoE, its successors and single-head baselines at one budget, three seeds. Flags: mhmoe reproduce --help
exec mhmoe reproduce family "$@"
