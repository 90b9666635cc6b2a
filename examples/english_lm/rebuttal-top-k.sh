#!/usr/bin/env bash
# The rebuttal: three and four experts for each sub-token. Flags: mhmoe reproduce --help
exec mhmoe reproduce rebuttal-top-k "$@"
