#!/usr/bin/env bash
# Our study of 14 languages: a shorter training, three seeds. Flags: mhmoe reproduce --help
exec mhmoe reproduce study-multilingual "$@"
