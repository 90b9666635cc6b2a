#!/usr/bin/env bash
# The rebuttal's tokens per second in use, by heads. Flags: mhmoe reproduce --help
exec mhmoe reproduce rebuttal-inference "$@"
