#!/usr/bin/env bash
# The paper's figure 6: 8 to 256 experts, perplexity and zero-shot tasks. Flags: mhmoe reproduce --help
exec mhmoe reproduce figure6 "$@"
