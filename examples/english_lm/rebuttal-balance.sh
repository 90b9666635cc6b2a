#!/usr/bin/env bash
# The rebuttal: balance losses over a training, with 8 and 32 experts. Flags: mhmoe reproduce --help
exec mhmoe reproduce rebuttal-balance "$@"
