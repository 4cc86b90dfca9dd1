#!/bin/bash
# Machines that share a file system and answer to ssh, without a scheduler:
#   DATA=/data/set OUTPUT=/runs/base examples/launch/ssh.sh node1 node2
# ntpseg must be installed under the same path everywhere; VENV names its environment.
set -euo pipefail

: "${DATA:?DATA must be the folder of the data set}" "${OUTPUT:?OUTPUT must be the folder of the run}"
[ $# -ge 1 ] || { echo "ssh.sh: hosts must be given, got none" >&2; exit 2; }
GPUS=${GPUS:-8} PORT=${PORT:-29500} PRESET=${PRESET:-base} ZERO=${ZERO:-zero2}
torchrun=${VENV:+$VENV/bin/}torchrun
hosts=("$@")

launch() {
    local pids=() index=0 failed=0 command
    for host in "${hosts[@]}"; do
        command="$torchrun --nnodes ${#hosts[@]} --node-rank $index --nproc-per-node $GPUS"
        command+=" --master-addr ${hosts[0]} --master-port $PORT -m ntpseg.cli$(printf ' %q' "$@")"
        ${SSH:-ssh -o BatchMode=yes} "$host" "cd $(printf '%q' "$PWD") && $command" &
        pids+=($!)
        index=$((index + 1))
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=$?; done
    return "$failed"
}

launch doctor --data "$DATA" --output "$OUTPUT"
launch train "$PRESET" data.path="$DATA" output="$OUTPUT" --deepspeed "$ZERO" ${RESUME:+--resume}
