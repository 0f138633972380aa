#!/usr/bin/env bash
# A run on one rented vast.ai machine, by their client (`uv tool install vastai`) and SSH:
#
#   launchers/vast.sh offers [QUERY]      what may be rented, cheapest first
#   launchers/vast.sh rent OFFER [BID]    rent it; with a bid in dollars an hour, interruptibly
#   launchers/vast.sh train ID ARGUMENTS  send this checkout's HEAD, install, train; also goes on
#   launchers/vast.sh log ID              follow what the run says
#   launchers/vast.sh send ID FOLDER      copy a data set there, to the same place in the checkout
#   launchers/vast.sh fetch ID RUN        copy a run directory here
#   launchers/vast.sh stop ID             SIGTERM: save and stop (exit code 75 in the log)
#   launchers/vast.sh end ID              give the machine back, and all that is on it
#
# An interruptible machine that was outbid goes on by itself when it is granted again: its start-up
# command is the last `train`. Its disk lives as long as the machine: `fetch` before `end`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

image=${IMAGE:-nvidia/cuda:13.0.1-base-ubuntu22.04}
disk=${DISK:-200} # GB
place=/root/matilda
# shellcheck disable=SC2016 # the machine expands these
start='cd /root/matilda 2>/dev/null && [ -x train.command ] && (setsid ./train.command >>train.log 2>&1 &)'

remote() { # ID COMMAND…: run a command there
    local address
    address=$(vastai ssh-url "$1")
    shift
    ssh -o StrictHostKeyChecking=accept-new "$address" "$@"
}

command=${1:-help}
shift || true
case $command in
offers)
    vastai search offers "${1:-gpu_name=H100_SXM num_gpus=1 reliability>0.98 cuda_vers>=13.0 disk_space>$disk}" \
        --order dph
    ;;
rent)
    offer=${1:?which OFFER? see: launchers/vast.sh offers}
    bid=()
    if [ $# -gt 1 ]; then bid=(--bid_price "$2"); fi
    vastai create instance "$offer" --image "$image" --disk "$disk" --ssh --direct \
        --onstart-cmd "$start" "${bid[@]}"
    ;;
train)
    id=${1:?which ID? see: vastai show instances}
    shift
    git archive HEAD | remote "$id" "mkdir -p $place && tar -x -C $place"
    remote "$id" "cd $place && apt-get update -q && apt-get install -q -y python3-pip gcc libc6-dev &&
        python3 -m pip install --quiet uv && python3 -m uv sync --all-packages --locked --no-dev --extra hub --extra nvml"
    printf '#!/usr/bin/env bash\nexport MATILDA_COMMIT=%s\nlaunchers/train.sh %s\necho "exit code $?"\n' \
        "$(git rev-parse HEAD)" "${*@Q}" |
        remote "$id" "cat >$place/train.command && chmod +x $place/train.command"
    remote "$id" "$start"
    echo "Training. Follow it: launchers/vast.sh log $id"
    ;;
log) remote "${1:?which ID?}" "tail -n 40 -f $place/train.log" ;;
send)
    id=${1:?which ID?}
    tar -c "${2:?which FOLDER?}" | remote "$id" "mkdir -p $place && tar -x -C $place"
    ;;
fetch)
    id=${1:?which ID?}
    remote "$id" "tar -c -C $place ${2:?which RUN, such as runs/hero?}" | tar -x
    ;;
# With several GPUs train.sh passes it on and says 75, with one it has become the app; the brackets keep
# pkill from the shell that runs it.
stop) remote "${1:?which ID?}" "pkill -TERM -f 'launchers/[t]rain.sh' || pkill -TERM -f 'apps/[t]rain.py'" ;;
end) vastai destroy instance "${1:?which ID?}" ;;
help | -h | --help) sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" ;;
*)
    echo "error: no command \`$command\`; see: launchers/vast.sh help" >&2
    exit 2
    ;;
esac
