#!/usr/bin/env bash
# Installs MegaBlocks' kernels into a Python's environment, which has torch and moetrain. Without them
# an A100 computes the experts in a slow loop of torch's (docs/kernels.md).
#   launch/clusters/kernels.sh [PYTHON]          PIP="uv pip" for an environment of uv's
# `make kernels` and the files beside this one call it.
set -euo pipefail

python=${1:-python}
read -ra pip <<< "${PIP:-$python -m pip}"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1

# A triton that came with torch stays.
"$python" -c 'import triton' 2> /dev/null \
  || "${pip[@]}" install --quiet --no-deps -c "$root/constraints.txt" triton==3.7.1
"${pip[@]}" install --quiet -c "$root/constraints.txt" setuptools packaging

# MegaBlocks pins old versions of torch and numpy without need, hence --no-deps and no isolated
# build. Its compiled module fails on CUDA 13 and needs a GPU to build: hiding the CUDA toolkit from
# torch skips it.
hidden=$(mktemp -d)
trap 'rm -rf "$hidden"' EXIT
echo 'import torch.utils.cpp_extension as extension; extension.CUDA_HOME = None' \
  > "$hidden/sitecustomize.py"
PYTHONWARNINGS=ignore PYTHONPATH=$hidden "${pip[@]}" install --quiet -c "$root/constraints.txt" \
  --no-build-isolation --no-deps megablocks stanford-stk
