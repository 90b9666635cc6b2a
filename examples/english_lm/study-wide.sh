#!/usr/bin/env bash
# The head-line study, twice as wide, 10 million tokens a run. Flags: mhmoe reproduce --help
exec mhmoe reproduce study-wide "$@"
