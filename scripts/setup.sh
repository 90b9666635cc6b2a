#!/usr/bin/env bash
# Makes an environment with everything pinned: scripts/setup.sh PYTHON VENV
# EXTRAS (default dev,plots,tensorboard) chooses the optional packages. Run it again after a failure:
# it goes on where it stopped. pip's own settings (PIP_INDEX_URL, ...) are respected.
set -euo pipefail

python=${1:?usage: scripts/setup.sh PYTHON VENV}
venv=${2:?usage: scripts/setup.sh PYTHON VENV}
extras=${EXTRAS-dev,plots,tensorboard} # EXTRAS= for none
cd "$(dirname "$0")/.."

"$python" scripts/check_machine.py "$venv"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
pins=constraints/py${version/./}.txt

say() { echo "setup: $*"; }
# Compiling every module of every package to byte code costs more than the few that are ever imported.
install() { "$venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check -c "$pins" "$@"; }

say "Python $version in $venv, pinned by $pins"
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv "$venv"
fi

if [ "$version" = 3.10 ]; then
    # omegaconf 2.0.6, which stock fairseq needs, has metadata that pip 24.1 and later refuse.
    "$venv/bin/python" - <<'PY' || "$venv/bin/python" -m pip install --quiet 'pip<24.1'
import sys, pip
sys.exit(tuple(int(part) for part in pip.__version__.split(".")[:2]) >= (24, 1))
PY
fi

say "1/3 torch and the tools to build with"
install torch torchvision numpy setuptools wheel cython ninja

say "2/3 fairseq"
if [ "$version" = 3.10 ]; then
    # In pip's own build environment: it holds no torch, and without torch fairseq leaves out its
    # C++ extensions for non-autoregressive models, the slowest part to compile.
    install 'fairseq==0.12.2' omegaconf hydra-core
else
    # Not in pip's build environment: that would download and unpack a second torch. Without debug information, and one
    # extension after the other: they share a build.ninja, which two at the same time read half-written.
    CFLAGS="-O1 -g0 ${CFLAGS-}" install --no-build-isolation 'fairseq-fixed==0.12.3.1'
fi

say "3/3 TorchScale, the tools and mhmoe_fairseq itself (editable)"
install --no-build-isolation -e ".${extras:+[$extras]}"

# Optional: without a compiler, or with one that fails, PyTorch's own operations do the same.
"$venv/bin/python" - <<'PY'
from mhmoe_fairseq.moe.cpu import kernels

try:
    kernels.build()
except (RuntimeError, OSError) as error:
    print(f"setup: no kernels for the CPU ({error}): experts and losses are slower on it, most of all in bf16")
PY

"$venv/bin/python" scripts/check_install.py
say "done: $venv/bin/mhmoe, $venv/bin/fairseq-train --user-dir mhmoe_fairseq"
