#!/bin/bash
# One replica over hosts that torchrun starts. On every host, with its own NODE_INDEX:
#
#   HOSTS=2 NODE_INDEX=0 LEADER=host-a MODEL=/models/Qwen3-0.6B NODE_KEY=node.key ALLOWED=allowed \
#       deploy/torchrun/node.sh -pp 2
#
# One process per host is enough: each node starts its own ranks. torchrun listens at LEADER:29500, the node's hosts meet
# at port 7070. NODE_KEY and ALLOWED are the files that `llmscale keys` has made. Without them a node listens on loopback
# only, so both "hosts" are this machine: LEADER=127.0.0.1 LISTEN=tcp://127.0.0.1:7000, without NODE_KEY and ALLOWED.
set -eu
keys=()
if [[ -n ${NODE_KEY:-} ]]; then
    keys=(--key-file "$NODE_KEY" --allow-list "$ALLOWED")
fi
exec "${TORCHRUN:-.venv/bin/torchrun}" --nnodes "$HOSTS" --nproc-per-node 1 --node-rank "$NODE_INDEX" \
    --master-addr "$LEADER" --master-port "${TORCHRUN_PORT:-29500}" --max-restarts 0 \
    -m llmscale.node --model "$MODEL" --listen "${LISTEN:-tcp://0.0.0.0:7000}" "${keys[@]}" "$@"
