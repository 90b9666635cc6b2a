#!/usr/bin/env bash
# study-by-width at twice the width, 10 million tokens a run. Flags: mhmoe reproduce --help
exec mhmoe reproduce study-wide "$@"
