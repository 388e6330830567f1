#!/usr/bin/env bash
# torchrun, started on every host: NODE_RANK=0..N-1 NODES=N MASTER=first-host scripts/cluster/torchrun.sh STAGE [key=value ...]
#
# Under Kubernetes (pytorchjob.yaml) the operator gives these numbers as PET_*. On machines with several networks also
# export NCCL_SOCKET_IFNAME (GPUs) or GLOO_SOCKET_IFNAME (CPU ranks).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

NODES=${NODES:-${PET_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${PET_NODE_RANK:-0}}
GPUS=${GPUS:-${PET_NPROC_PER_NODE:-8}}
MASTER=${MASTER:-${PET_MASTER_ADDR:-127.0.0.1}}
PORT=${PORT:-${PET_MASTER_PORT:-29500}}
unset "${!PET_@}" # torchrun would read them beside its options
# Time for the ranks to finish their step and save when torchrun is told to end (its own default is 30 s).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-300}

source scripts/cluster/stages.sh
stage_command "${1:-}"
shift
exec torchrun --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "$GPUS" \
    --master_addr "$MASTER" --master_port "$PORT" "${COMMAND[@]}" "$@"
