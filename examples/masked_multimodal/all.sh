#!/usr/bin/env bash
# The whole experiment: data, tables 1 and 4, figure 8. Flags: mhmoe reproduce --help (--jobs 2: two runs at a time)
exec mhmoe reproduce multimodal "$@"
