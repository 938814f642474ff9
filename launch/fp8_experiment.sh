#!/usr/bin/env bash
# FP8 against BF16 on one small model: trains it once with each precision, then draws the relative loss differences.
#
#   ./launch/fp8_experiment.sh [PRECISION ...]
#
# Without arguments: fp8_deepseek, fp8_tensorwise and fp8_gradient_blocks, each some 30 minutes on two idle cores, and
# BF16 first. The runs lie in runs/fp8; interrupted, it goes on where it was. docs/fp8.md tells what came out once.
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh plots,tokenizer

if [ $# -eq 0 ]; then
    set -- fp8_deepseek fp8_tensorwise fp8_gradient_blocks
fi
[ -e runs/fp8/tokenizer.json ] || dsjax tokenizer --config configs/fp8_experiment.py
for precision in bf16 "$@"; do
    dsjax train --config "configs/fp8_experiment.py:$precision" --workdir "runs/fp8/$precision"
done
dsjax report "${@/#/runs/fp8/}" --against runs/fp8/bf16 --out runs/fp8/report
