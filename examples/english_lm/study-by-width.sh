#!/usr/bin/env bash
# The head-line study, experts' second map learning the slower the more inputs it has. Flags: mhmoe reproduce --help
exec mhmoe reproduce study-by-width "$@"
