#!/usr/bin/env bash
# Our study of images and text: a shorter training, learning rates searched, three seeds. Flags: mhmoe reproduce --help
exec mhmoe reproduce study-multimodal "$@"
