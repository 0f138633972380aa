#!/usr/bin/env bash
# Train on this machine: launchers/train.sh --config configs/base_152m_v2.json --data-dir D --run-dir R
#
# With one GPU or none this becomes the app itself, exit codes and all. With several it starts
# torchrun, which ends with 1 whatever its workers said: bad input is found before, in one process,
# and ends with 2; a signal is passed on, the workers save (torchrun kills what has not ended 30 s
# later), and this ends with 75: run it again.
#
# GPUS      processes on this machine (default: the GPUs of CUDA_VISIBLE_DEVICES, else of nvidia-smi)
# NNODES    machines; start this on each, with HEAD=HOST:PORT of one of them
# RESTARTS  how often torchrun starts all workers again after one died (3)
# PYTHON    interpreter (default: the environment that `uv sync --all-packages` makes)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
nodes=${NNODES:-1}
list_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep '^[0-9GM]' # numbers, or names of GPUs and MIG parts
    else
        nvidia-smi --list-gpus 2>/dev/null
    fi
}
gpus=${GPUS:-$({ list_gpus || true; } | wc -l)}
if [[ ! $gpus$nodes =~ ^[0-9]+$ ]]; then
    echo "train.sh: GPUS is '$gpus' and NNODES '$nodes', but both are numbers" >&2
    exit 2
fi
if [ "$nodes" -le 1 ] && [ "$gpus" -le 1 ]; then
    exec "$python" apps/train.py "$@"
fi

if [ "$nodes" -le 1 ]; then
    meeting=(--standalone)
else
    meeting=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-id matilda
        --rdzv-endpoint "${HEAD:?give HEAD=HOST:PORT of one of the machines}")
    # Else a machine that comes back waits for an address that the others have long had.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi

stopped=
child=
pass_on() {
    stopped=1
    if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap pass_on TERM INT USR1
run() { # in the background, where signals can be passed on; its exit code in `code`
    "$@" &
    child=$!
    if [ -n "$stopped" ]; then pass_on; fi
    while kill -0 "$child" 2>/dev/null; do
        wait "$child" || true # also returns when a signal arrives
    done
    code=0
    wait "$child" || code=$?
}

run env WORLD_SIZE=$((nodes * gpus)) "$python" apps/train.py --check "$@"
if [ -n "$stopped" ]; then exit 75; fi
if [ "$code" -eq 2 ]; then exit 2; fi
run "$python" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$gpus" \
    --max-restarts "${RESTARTS:-3}" apps/train.py "$@"
if [ -n "$stopped" ] && [ "$code" -ne 0 ]; then code=75; fi
exit "$code"
