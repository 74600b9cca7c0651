#!/usr/bin/env bash
# Lint, types and tests, in .venv; makes it and installs everything first where that is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
install_captioner dev

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# In parallel, with one thread each: torch's threads would wait for each other.
OMP_NUM_THREADS=1 .venv/bin/pytest --numprocesses auto "$@"
