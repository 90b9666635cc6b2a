#!/usr/bin/env bash
# What decides: 2.5 times the study's updates. Flags: mhmoe reproduce --help
exec mhmoe reproduce length-2.5 "$@"
