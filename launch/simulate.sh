#!/usr/bin/env bash
# Any configuration on N simulated devices of this machine's CPU.
#
#   ./launch/simulate.sh N CONFIG [--config.section.field=value ...]
#   ./launch/simulate.sh 4 configs/tiny.py --config.training.total_steps=20
#
# The run lies in runs/, named after the configuration and N. The devices share the cores: this shows that a mesh works
# and what it computes, never how fast it is.
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
fi
if [ $# -lt 2 ]; then
    echo "usage: $0 N CONFIG [--config.section.field=value ...]" >&2
    exit 2
fi
devices=$1
config=$2
shift 2
if [ "${config#/}" = "$config" ] && [ -f "${config%:*}" ]; then
    config=$PWD/$config  # a path from where the caller stands
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh plots

name=$(basename "${config%.py*}")
form=${config##*.py}
exec dsjax train --config "$config" --devices "$devices" --workdir "runs/$name${form/:/-}-on-$devices" "$@"
