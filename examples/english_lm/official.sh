#!/usr/bin/env bash
# The official repository's recipe, its number of heads made explicit. Flags: mhmoe reproduce --help
exec mhmoe reproduce official "$@"
