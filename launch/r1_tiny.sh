#!/usr/bin/env bash
# R1's pipeline on a small model and two cores: pretraining, cold start, reinforcement learning, distillation.
#
#   ./launch/r1_tiny.sh [--config.section.field=value ...]      the overrides are for the RL phase
#
# Each part goes on where it was interrupted. Everything lies in runs/r1_tiny; remove that folder to start again.
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh plots

runs=runs/r1_tiny
config=configs/r1_tiny.py
mkdir -p "$runs"

part() { printf '\n== %s\n' "$1"; }

part "1. pretraining on single facts of arithmetic: no question, no chain, no format"
[ -s "$runs/facts.txt" ] || python launch/arithmetic_facts.py "$runs/facts.txt"
dsjax train --config $config:base --workdir "$runs/base"

part "2. cold start: fine-tuning on solutions, of which two thirds are the answer without the way there"
dsjax collect --config $config:cold_start --problems 16000 --brief 0.65 --out "$runs/cold_start.jsonl" | tail -n 1
dsjax sft --config $config:cold_start --workdir "$runs/cold_start"

part "3. reinforcement learning: rewards for the right answer and the format, nothing else"
dsjax grpo --config $config:rl --workdir "$runs/rl" "$@"

part "4. rejection sampling: the base model again, on right answers of the one before"
dsjax collect --config $config:rl --checkpoint "$runs/rl" --problems 8000 --out "$runs/accepted.jsonl" | tail -n 1
dsjax sft --config $config:sft --workdir "$runs/sft"

part "5. reinforcement learning once more, at a temperature of 0.7"
dsjax grpo --config $config:rl_final --workdir "$runs/rl_final"

part "6. distillation: the cold start as a student of the reinforced one, against the same student by rewards alone"
dsjax distill --config $config:student --teacher "$runs/rl" --problems 1500 --workdir "$runs/student"
dsjax grpo --config $config:student_rl --workdir "$runs/student_rl"

part "7. accuracy on the same 500 held-out problems: pass@1, and the majority of 4 samples"
for run in cold_start rl sft rl_final student student_rl; do
    found=$(dsjax eval --checkpoint "$runs/$run" --config $config:rl --problems 500 --samples 4 | tr -d '\n')
    echo "$run: $found"
done
