#!/usr/bin/env bash
# The paper's figure 7: experts per token of polysemous and control words. Flags: mhmoe reproduce --help
exec mhmoe reproduce figure7 "$@"
