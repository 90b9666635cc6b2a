#!/usr/bin/env bash
# The paper's table 7: 0 to 3 layers in each projection, perplexity and zero-shot tasks. Flags: mhmoe reproduce --help
exec mhmoe reproduce table7 "$@"
