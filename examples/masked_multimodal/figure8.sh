#!/usr/bin/env bash
# The paper's figures 8 and 10: experts of each image patch, over a training. Flags: mhmoe reproduce --help
exec mhmoe reproduce figure8 "$@"
