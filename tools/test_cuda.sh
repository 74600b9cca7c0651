#!/usr/bin/env bash
# The tests that need an NVIDIA GPU, with the Python that is active: it needs the package's own
# requirements, pytest and hypothesis. What is given goes on to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH=. exec python -m pytest -m cuda "$@"
