#!/usr/bin/env bash
# What decides: 60 % of the study's updates. Flags: mhmoe reproduce --help
exec mhmoe reproduce length-60 "$@"
