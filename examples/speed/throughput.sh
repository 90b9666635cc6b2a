#!/usr/bin/env bash
# The rebuttal's throughput in training, static and dynamic routing. Flags: mhmoe reproduce --help
exec mhmoe reproduce rebuttal-throughput "$@"
