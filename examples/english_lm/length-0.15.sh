#!/usr/bin/env bash
# What decides: 0.15 times the study's updates. Flags: mhmoe reproduce --help
exec mhmoe reproduce length-0.15 "$@"
