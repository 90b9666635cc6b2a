#!/usr/bin/env bash
# The rebuttal: 128 experts top-1 against 256 top-2. Flags: mhmoe reproduce --help
exec mhmoe reproduce rebuttal-activation "$@"
