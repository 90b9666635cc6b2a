#!/usr/bin/env bash
# The paper's figure 7: experts of polysemous words, beside a control. Flags: mhmoe reproduce --help
exec mhmoe reproduce figure7 "$@"
