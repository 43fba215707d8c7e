#!/bin/bash
# Pretraining on two machines without a scheduler. The same line on each of them, in any order:
#
#   bash examples/two-nodes.sh first-host:29500 --config v2-base --data /shared/videos.csv \
#     --out /shared/runs/mine
#
# The first argument is where they meet: a free port of one of the two, which the other reaches.
# What follows goes to `vmae-fast pretrain`, and is the same on both; --out and the data must be
# at the same path on both, on a disk that both see.
#
# From the environment, where they are set:
#   GPUS        processes on this machine; otherwise one for each of its GPUs
#   LOCAL_ADDR  by which the other machine reaches this one, where its host name does not do
#   NODES       machines, where there are more than two

set -euo pipefail

if [[ $# -lt 1 || $1 != *:* ]]; then
  echo "usage: two-nodes.sh HOST:PORT [flags of vmae-fast pretrain]; got: ${1:-nothing}" >&2
  exit 2
fi
endpoint=$1
shift

# --auto-resume: the same line goes on with the run after an interruption. A process that dies on
# one machine has those of both start again from the last checkpoint (--max-restarts). The launcher
# kills what is not gone --shutdown-timeout seconds after a signal: 30 unless told, too few to save
# a large model.
exec torchrun "--nnodes=${NODES:-2}" "--nproc-per-node=${GPUS:-gpu}" \
  --rdzv-backend=c10d "--rdzv-endpoint=$endpoint" "--rdzv-id=$endpoint" \
  ${LOCAL_ADDR:+"--local-addr=$LOCAL_ADDR"} \
  --max-restarts=3 --shutdown-timeout=150 \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m vmae_fast.cli pretrain "$@" --auto-resume
