#!/usr/bin/env bash
# Everything that only a GPU can settle, in one command: see README.md beside this file.
#   bash benchmarks/gpu/run.sh [--dry-run] [--only SUITE] [--out DIR] [--budget-seconds 520] [--fresh]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}"
# PYTHON, else the first that has torch and triton: the machine's own, or the one that `make setup-dev` has made
for python in "${PYTHON:-python3}" .venv/bin/python; do
    if "$python" -c 'import torch, triton' 2>/dev/null; then
        exec "$python" -m benchmarks.gpu "$@"
    fi
done
echo "benchmarks/gpu/run.sh: neither ${PYTHON:-python3} nor .venv/bin/python has torch and triton; name one: PYTHON=..." >&2
exit 2
