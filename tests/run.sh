#!/usr/bin/env bash
# Sets up a virtual environment (once) and runs every check: lint, format, types, tests.
#
#   ./tests/run.sh [pytest arguments]     --slow adds the slow tests; PYTHON and DSJAX_VENV as in launch/install.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh test

ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
