#!/usr/bin/env bash
# The paper's table 4: fine-tuned on questions, statements, captions. Flags: mhmoe reproduce --help
exec mhmoe reproduce table4 "$@"
