#!/usr/bin/env bash
# The paper's figures 1 and 5: which of 32 experts are active in each layer. Flags: mhmoe reproduce --help
exec mhmoe reproduce figure1 "$@"
