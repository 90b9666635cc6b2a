#!/usr/bin/env bash
# The paper's figures 4 and 9: perplexity over a training, with 8 and 32 experts. Flags: mhmoe reproduce --help
exec mhmoe reproduce figure4 "$@"
