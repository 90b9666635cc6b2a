#!/usr/bin/env bash
# What decides: 15 % of the study's updates. Flags: mhmoe reproduce --help
exec mhmoe reproduce length-15 "$@"
