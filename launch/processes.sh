#!/usr/bin/env bash
# Trains on N real processes of this machine, joined as the hosts of a cluster are: one CPU device each.
#
#   ./launch/processes.sh N [train|bench] --config FILE [arguments of dsjax train or bench]
#   ./launch/processes.sh 4 --config configs/tiny.py --workdir runs/four --config.training.total_steps=20
#
# Process 0 prints; of the others only errors are shown, each line with the number of its process. When one fails, all
# end, with its exit code. Ctrl-C and SIGTERM reach all of them: the run saves and ends; once more ends it at once.
# `--devices M` gives each process M simulated devices. The processes share the cores: this shows what they compute, not
# how fast they are.
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
fi
case ${1:-} in
    '' | *[!0-9]* | 0*) echo "usage: $0 N [train|bench] --config FILE [arguments]; N is at least 1" >&2 && exit 2 ;;
esac
number=$1
shift
case ${1:-} in
    train | bench) command=$1 && shift ;;
    *) command=train ;;
esac
root=$(dirname "${BASH_SOURCE[0]}")/..
here=$PWD
cd "$root"
. launch/install.sh plots
cd "$here"  # paths count from where the caller stands

port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
arguments=("$command" --devices 1 "$@" --coordinator "127.0.0.1:$port" --processes "$number")

set -m  # each process leads a group of its own, which a signal to the terminal does not reach: it is passed on below
pids=()
stopped=
end_all() {
    for pid in "${pids[@]}"; do
        kill -s "$1" -- "-$pid" 2> /dev/null || true
    done
}
stop() { # stop EXIT_CODE
    if [ -n "$stopped" ]; then
        end_all KILL
        exit $((128 + 15))
    fi
    stopped=$1
    end_all TERM
}
trap 'end_all KILL' EXIT
trap 'stop 130' INT
trap 'stop 0' TERM

marked() { # marked PROCESS COMMAND ...: its errors, line by line, with the number of the process
    local prefix="[$1] "
    shift
    trap : INT TERM  # this shell outlives the signal, to pass on what the process still says and its exit code
    "$@" 2>&1 > /dev/null | {
        trap '' INT TERM
        while IFS= read -r line || [ -n "$line" ]; do
            printf '%s%s\n' "$prefix" "$line" >&2
        done
    }
}
dsjax "${arguments[@]}" --process 0 &
pids+=($!)
for ((process = 1; process < number; process++)); do
    marked "$process" dsjax "${arguments[@]}" --process "$process" &
    pids+=($!)
done

left=("${pids[@]}")
while [ ${#left[@]} -gt 0 ]; do
    running=()
    for pid in "${left[@]}"; do
        if kill -0 "$pid" 2> /dev/null; then
            running+=("$pid")
            continue
        fi
        code=0
        wait "$pid" || code=$?
        if [ "$code" != 0 ]; then
            sleep 2  # for what the others have to tell
            echo "dsjax: a process ended with exit code $code, and the others with it" >&2
            exit "$code"
        fi
    done
    left=(${running[@]+"${running[@]}"})
    sleep 0.2 || true
done
exit "${stopped:-0}"
