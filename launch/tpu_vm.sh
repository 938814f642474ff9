#!/usr/bin/env bash
# Trains on a TPU slice, with the repository in the home directory. First one host prepares the data, then all train:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=0 --command='cd dsjax && ./launch/tpu_vm.sh prepare'
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='cd dsjax && ./launch/tpu_vm.sh train'
#
# More arguments are passed on. Edit the five lines below. The corpus, the tokenizer, the prepared data and the run must
# lie where every host sees them, such as a mounted bucket or Filestore; started again, the run goes on from its last
# checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CONFIG=configs/deepseek_v2_lite.py
CORPUS=/mnt/shared/corpus             # a folder of txt, jsonl, jsonl.gz or parquet
TOKENIZER=/mnt/shared/tokenizer.json  # the model's vocabulary
PREPARED=/mnt/shared/prepared         # where the packed tokens go
RUN=/mnt/shared/runs/v2-lite

. launch/install.sh tpu,tokenizer,plots

data=(--config "$CONFIG" --config.data.sources="text_files:$CORPUS" --config.data.tokenizer="$TOKENIZER"
    --config.data.directory="$PREPARED")
case ${1:-} in
    prepare) exec dsjax prepare "${data[@]}" "${@:2}" ;;
    train) exec dsjax train --distributed --workdir "$RUN" "${data[@]}" "${@:2}" ;;
    *) echo "usage: $0 prepare|train [--config.section.field=value ...]" >&2 && exit 2 ;;
esac
