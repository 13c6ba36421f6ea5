#!/bin/sh
# Renew the lock files that machines and images install from. Needs uv: pip install uv==0.13.9
#
#     infra/lock.sh              # newest versions that pyproject.toml allows
#     CPU_WHEELS=/folder infra/lock.sh   # torch's CPU wheel from a folder, not from PyTorch's index
#
# Two locks, because torch has two builds: the one on PyPI needs CUDA's packages, the one on
# PyTorch's own index needs none. All else is the same in both.
set -eu
cd "$(dirname "$0")/.."
export UV_CUSTOM_COMPILE_COMMAND=infra/lock.sh

lock() { # OUTPUT INPUT OPTION...
    output=$1
    shift
    uv pip compile --quiet --upgrade --generate-hashes --no-annotate --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --output-file "$output" "$@"
}

lock infra/requirements-cuda.lock pyproject.toml
torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' infra/requirements-cuda.lock)
pin=$(mktemp)
trap 'rm -f "$pin"' EXIT
grep -E '^[a-z0-9_.-]+==' infra/requirements-cuda.lock | sed 's/ .*//' |
    grep -v '^torch==' > "$pin" # what both have is the same
echo "torch==$torch+cpu" >> "$pin"
if [ -n "${CPU_WHEELS:-}" ]; then
    lock infra/requirements-cpu.lock pyproject.toml --constraints "$pin" --find-links "$CPU_WHEELS"
else
    lock infra/requirements-cpu.lock pyproject.toml --constraints "$pin" --torch-backend cpu
fi
lock infra/mlflow/requirements.lock infra/mlflow/requirements.in
