#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that xpk (github.com/AI-Hypercomputer/xpk) has made.
#
#   docker build -f launch/Dockerfile --build-arg EXTRAS=tpu,tokenizer,plots -t IMAGE . && docker push IMAGE
#   ./launch/xpk.sh [--config.section.field=value ...]
#
# Edit the lines up to the dashes. xpk starts the command on every host of every slice; dsjax finds the others by the
# variables that GKE sets for TPUs. A failed workload starts again, up to MAX_RESTARTS times, and goes on from the newest
# checkpoint; a mistake or a diverged loss (exit code 2) ends it. STORAGE is one that `xpk storage attach`
# has made known to the cluster; every host sees it at the place that was named there.
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
fi

WORKLOAD=dsjax-v2-lite
CLUSTER=my-cluster
PROJECT=my-project
ZONE=us-east5-a
TPU_TYPE=v5p-128
SLICES=1  # with more, config.mesh.data must be a multiple of it
IMAGE=us-docker.pkg.dev/my-project/my-repository/dsjax:latest
STORAGE=my-storage
CONFIG=configs/deepseek_v2_lite.py
CORPUS=/mnt/shared/corpus             # a folder of txt, jsonl, jsonl.gz or parquet
TOKENIZER=/mnt/shared/tokenizer.json  # the model's vocabulary
PREPARED=/mnt/shared/prepared         # where the packed tokens go; the first to be done wins
RUN=/mnt/shared/runs/v2-lite
MAX_RESTARTS=20
# ---------------------------------------------------------------------------------------------------------------------

train=(dsjax train --distributed --config "$CONFIG" --workdir "$RUN" --config.data.sources="text_files:$CORPUS"
    --config.data.tokenizer="$TOKENIZER" --config.data.directory="$PREPARED" "$@")

xpk workload create --workload="$WORKLOAD" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
    --tpu-type="$TPU_TYPE" --num-slices="$SLICES" --docker-image="$IMAGE" --storage="$STORAGE" \
    --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=1 --termination-grace-period-seconds=300 \
    --command="$(printf '%q ' "${train[@]}")"
