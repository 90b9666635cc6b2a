#!/usr/bin/env bash
# The rebuttal's tokens per second in vLLM, by heads, after make test-vllm. Flags: mhmoe reproduce --help
exec mhmoe reproduce rebuttal-serving "$@"
