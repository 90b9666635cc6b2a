#!/usr/bin/env bash
# The paper's figure 1: which of 32 experts are active on zero-shot tasks, in each layer. Flags: mhmoe reproduce --help
exec mhmoe reproduce figure1 "$@"
