#!/usr/bin/env bash
# The paper's figure 5: which of 32 experts are active on XNLI, in each layer. Flags: mhmoe reproduce --help
exec mhmoe reproduce figure5 "$@"
