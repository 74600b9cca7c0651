#!/usr/bin/env bash
# Lint, types and tests, in .venv; makes it and installs everything first where that is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
install_captioner dev

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/pytest "$@"
