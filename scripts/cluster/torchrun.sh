#!/bin/bash
# Training on several machines without a scheduler. Run the same line on every machine:
#
#   HEAD=node0 NODES=4 scripts/cluster/torchrun.sh --config configs/llava_next_pdrop.yaml data.root=/data/llava_next
set -euo pipefail

: "${HEAD:?is not set: the name or address of one of the machines, where they meet}"
: "${NODES:?is not set: the number of machines}"
PORT=${PORT:-29400}                             # open on HEAD
GPUS=${GPUS:-gpu}                               # ranks a machine; gpu: one for each GPU
JOB=${JOB:-vtprune}                             # the same on all machines, another one for each job that meets at HEAD:PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}    # ranks and workers are many; one thread each

exec vtprune launch --nnodes "$NODES" --nproc_per_node "$GPUS" \
  --rdzv_backend c10d --rdzv_endpoint "$HEAD:$PORT" --rdzv_id "$JOB" "$@"
