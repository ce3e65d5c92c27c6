#!/bin/bash
# Training on the machines of a DeepSpeed hostfile (lines such as `node0 slots=8`). With passwordless ssh, on one machine:
#
#   HOSTFILE=hostfile scripts/cluster/deepspeed.sh --config configs/llava_next_pdrop.yaml data.root=/data/llava_next
#
# Without ssh, on every machine, NODE_RANK being the number of its line in the hostfile, from 0:
#
#   HOSTFILE=hostfile NODE_RANK=0 HEAD=node0 scripts/cluster/deepspeed.sh --config ...
set -euo pipefail

: "${HOSTFILE:?is not set: a file with a line such as node0 slots=8 for each machine}"
PORT=${PORT:-29500}                             # open on the first machine
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}    # ranks and workers are many; one thread each

where=()
if [[ -n ${NODE_RANK:-} ]]; then
  : "${HEAD:?is not set: the name or address of the first machine in the hostfile}"
  where=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$HEAD")
fi
exec deepspeed --hostfile "$HOSTFILE" "${where[@]}" --master_port "$PORT" train.py "$@"
