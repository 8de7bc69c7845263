#!/usr/bin/env bash
# Makes a virtual environment and installs this package into it: install.sh VENV LOCK. LOCK is a file of this folder;
# `latest` are the newest versions that pyproject.toml permits. From the environment: PYTHON, and GPU=1 for CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 lock=$2 python=${PYTHON:-python3} gpu=${GPU:-0}
cpu_index=https://download.pytorch.org/whl/cpu

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "sleeptrain needs Python 3.11 or newer; $python is $("$python" -V 2>&1). Try: make PYTHON=python3.12 install" >&2
    exit 1
}
"$python" -m venv "$venv" || { echo "$python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
pip() { "$venv/bin/python" -m pip "$@"; }

# PyPI's torch for Linux brings 3 GB of CUDA; pytorch.org has the same version without, unless pip was told of another place.
index=()
if [ "$gpu" != 1 ] && [ "$(uname -s)" = Linux ] && ! pip config list | grep find-links >/dev/null; then
    index=(--extra-index-url "$cpu_index")
fi

options=(--no-compile ${index[@]+"${index[@]}"})

if [ "$lock" = latest ]; then
    extras=dev
    [ "$gpu" != 1 ] || extras=dev,gpu
    pip install --upgrade --upgrade-strategy eager "${options[@]}" -e ".[$extras]"
else
    # What builds a package that has no wheel comes from the lock too; pip before 25.3 knows the first name alone.
    PIP_CONSTRAINT=$lock PIP_BUILD_CONSTRAINT=$lock pip install "${options[@]}" -r "$lock"
    pip install --no-deps --no-build-isolation -e .
fi

# pip compiles one file after another, which takes as long as all the rest. Some packages have templates that are no
# Python and cannot be compiled.
"$venv/bin/python" -m compileall -q -j 0 "$venv/lib" sleeptrain >/dev/null 2>&1 || true

# Triton may come where the lock names it: the environment of `make test-kernels` interprets it on a CPU.
packages=
for package in $(pip list 2>/dev/null | awk '$1 ~ /^(nvidia-|triton$)/ { print $1 }'); do
    grep -qs "^$package==" "$lock" || packages+=" $package"
done
if [ "$gpu" != 1 ] && [ -n "$packages" ]; then
    echo "CUDA packages were installed on a machine without a GPU:$packages" >&2
    echo "Remove $venv and point pip at a CPU build of torch (PIP_FIND_LINKS or $cpu_index), or say GPU=1" >&2
    exit 1
fi
