#!/usr/bin/env bash
# Trains on a TPU slice; to be run on every host of it at once, with the repository in the home directory:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='cd dsjax && ./launch/tpu_vm.sh'
#
# Edit the four lines below. The corpus, the prepared data and the run must lie where every host sees them, such as a
# mounted bucket or Filestore; started again, the run goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CONFIG=configs/deepseek_v2_lite.py
CORPUS=/mnt/shared/corpus      # a folder of txt, jsonl, jsonl.gz or parquet
PREPARED=/mnt/shared/prepared  # where the packed tokens go
RUN=/mnt/shared/runs/v2-lite

. launch/install.sh tpu

exec dsjax train --distributed --config "$CONFIG" --workdir "$RUN" \
    --config.data.sources="text_files:$CORPUS" --config.data.directory="$PREPARED" "$@"
