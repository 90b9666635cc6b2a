#!/usr/bin/env bash
# What decides between MH-MoE and X-MoE: one setting at a time. Flags: mhmoe reproduce --help
exec mhmoe reproduce causes "$@"
