#!/usr/bin/env bash
# What decides: the learning rate of the experts' second map. Flags: mhmoe reproduce --help
exec mhmoe reproduce expert-rates "$@"
