#!/usr/bin/env bash
# DeepSpeed's launcher, from one host over ssh: scripts/cluster/deepspeed.sh STAGE [key=value ...]
#
# Every host needs this checkout and its environment at the same path, and ssh without a password. Variables of the
# environment that the ranks need (NCCL_SOCKET_IFNAME, HF_HOME, ...) go into a file .deepspeed_env, one NAME=VALUE a line.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

HOSTS=${HOSTS:-scripts/cluster/hostfile}
PORT=${PORT:-29500}

source scripts/cluster/stages.sh
stage_command "${1:-}"
shift
if [[ ${COMMAND[0]} == -m ]]; then # deepspeed's own word for it; the rank is in the environment too
    COMMAND=(--module --no_local_rank "${COMMAND[@]:1}")
fi
exec deepspeed --hostfile "$HOSTS" --master_port "$PORT" "${COMMAND[@]}" "$@"
