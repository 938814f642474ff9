#!/usr/bin/env bash
# Sets up a virtual environment (once) and runs every check: lint, format, types, tests; a file of tests on each of up to
# four processors at a time.
#
#   ./tests/run.sh [pytest arguments]     --slow adds the slow tests, -n 0 runs one test after the other (for -s, --pdb);
#                                         PYTHON and DSJAX_VENV as in launch/install.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh test

ruff check .
ruff format --check .
mypy
exec python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
