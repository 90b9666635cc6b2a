#!/usr/bin/env bash
# The paper's table 1, masked multimodal: dense, X-MoE and MH-MoE. Flags: mhmoe reproduce --help
exec mhmoe reproduce table1-multimodal "$@"
