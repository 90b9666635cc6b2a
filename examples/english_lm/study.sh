#!/usr/bin/env bash
# The head-line study: MH-MoE under both budgets, three seeds. Flags: mhmoe reproduce --help
exec mhmoe reproduce study "$@"
