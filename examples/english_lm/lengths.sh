#!/usr/bin/env bash
# What decides: the number of tokens. Flags: mhmoe reproduce --help
exec mhmoe reproduce lengths "$@"
