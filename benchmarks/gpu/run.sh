#!/usr/bin/env bash
# Everything that only a GPU can settle, in one command: see README.md beside this file.
#   bash benchmarks/gpu/run.sh [--dry-run] [--only PART] [--out DIR] [--budget-seconds 520] [--fresh]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
