#!/usr/bin/env bash
# Everything, on any machine with Python 3.11 to 3.13: install, train a small model on 8 simulated devices, let it write.
#
#   ./launch/quickstart.sh [--config.section.field=value ...]
#
# Interrupted, it goes on where it was. The run lies in runs/quickstart; remove that folder to start again.
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh plots

run=runs/quickstart
dsjax train --config configs/tiny.py --devices 8 --workdir "$run" "$@"

echo "sample:"
dsjax generate --checkpoint "$run" --prompt "def __init__(self" --max-new-tokens 300 --temperature 0.7
