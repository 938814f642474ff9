#!/usr/bin/env bash
# Trains on a TPU slice of Google Cloud, from your own machine: gcloud runs every step on all of its hosts.
#
#   ./launch/tpu_vm.sh create      # rents the slice
#   ./launch/tpu_vm.sh setup       # copies this repository to all hosts and installs it
#   ./launch/tpu_vm.sh prepare     # the first host packs the corpus
#   ./launch/tpu_vm.sh train [--config.section.field=value ...]
#   ./launch/tpu_vm.sh delete      # stops paying
#
# Edit the lines up to the dashes. The corpus, the tokenizer, the prepared data and the run must lie where every host
# sees them, such as a mounted bucket or Filestore. When training fails it starts again, up to MAX_RESTARTS times, and
# goes on from the newest checkpoint; a mistake or a diverged loss, which dsjax tells in a sentence (exit code 2), ends
# it, where gcloud passes the code on. A slice that Google has taken back (spot) must be created and set up again; then
# train goes on too.
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NAME=dsjax
ZONE=us-east5-a
TYPE=v5p-128  # gcloud compute tpus accelerator-types list --zone=ZONE
RUNTIME=v2-alpha-tpuv5
PRICING=(--spot)  # () for on demand, (--reserved) for a reservation
CONFIG=configs/deepseek_v2_lite.py
CORPUS=/mnt/shared/corpus             # a folder of txt, jsonl, jsonl.gz or parquet
TOKENIZER=/mnt/shared/tokenizer.json  # the model's vocabulary
PREPARED=/mnt/shared/prepared         # where the packed tokens go
RUN=/mnt/shared/runs/v2-lite
MAX_RESTARTS=20
# ---------------------------------------------------------------------------------------------------------------------

on() { # on WORKER COMMAND: runs it in the repository on one host, or on all
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="cd dsjax && $2"
}

step=${1:-}
[ $# -gt 0 ] && shift
data=(--config "$CONFIG" --config.data.sources="text_files:$CORPUS" --config.data.tokenizer="$TOKENIZER"
    --config.data.directory="$PREPARED" "$@")
quoted=$(printf ' %q' "${data[@]}")
case $step in
    create)
        gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$RUNTIME" \
            ${PRICING[@]+"${PRICING[@]}"}
        ;;
    setup)
        archive=$(mktemp)
        trap 'rm -f "$archive"' EXIT
        tar -czf "$archive" --exclude=./.venv --exclude=./.git --exclude=./.cache --exclude=./runs .
        gcloud compute tpus tpu-vm scp "$archive" "$NAME:dsjax.tar.gz" --zone="$ZONE" --worker=all
        gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
            --command="mkdir -p dsjax && tar -xzf dsjax.tar.gz -C dsjax"
        on all ". launch/install.sh tpu,tokenizer,plots"
        ;;
    prepare) on 0 ".venv/bin/dsjax prepare$quoted" ;;
    train)
        restarts=0
        code=0
        on all ".venv/bin/dsjax train --distributed --workdir $(printf %q "$RUN")$quoted" || code=$?
        while [ "$code" != 0 ] && [ "$code" != 2 ] && [ "$restarts" -lt "$MAX_RESTARTS" ]; do
            restarts=$((restarts + 1))
            echo "the run goes on from its newest checkpoint (restart $restarts of $MAX_RESTARTS)"
            on all "pkill -KILL -f '[d]sjax train' || true"  # what is left of it on other hosts
            code=0
            on all ".venv/bin/dsjax train --distributed --workdir $(printf %q "$RUN")$quoted" || code=$?
        done
        exit "$code"
        ;;
    delete) gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet ;;
    *) echo "usage: $0 create|setup|prepare|train|delete [--config.section.field=value ...]" >&2 && exit 2 ;;
esac
