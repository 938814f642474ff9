#!/usr/bin/env bash
# Everything, on any machine with Python 3.11 to 3.13: install, train a small model on 8 simulated devices, let it write.
#
#   ./launch/quickstart.sh [--config.section.field=value ...]
#
# Interrupted, it goes on where it was. The run lies in runs/quickstart; remove that folder to start again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh plots

run=runs/quickstart
dsjax train --config configs/tiny.py --devices 8 --workdir "$run" "$@"
sample=$(dsjax generate --checkpoint "$run" --prompt "def __init__(self" --max-new-tokens 300 --temperature 0.7)

python - "$run/metrics.jsonl" <<'PYTHON'
import json
import sys

rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
validation = [row["validation_nats_per_byte"] for row in rows if "validation_nats_per_byte" in row]
print()
print(f"validation loss: {validation[-1]:.3f} nats per byte" if validation else "validation loss: not measured yet")
print(f"cost:            ${rows[-1]['cost_usd']:.4f}")
PYTHON
printf 'loss plot:       %s\nsample:\n%s\n' "$run/plots/loss.png" "$sample"
