#!/usr/bin/env bash
# MH-MoE balanced without a loss: gates as they are, or adding up to 1, three seeds. Flags: mhmoe reproduce --help
exec mhmoe reproduce loss-free "$@"
