#!/usr/bin/env bash
# launchers/keep.sh FOLDER KEPT COMMAND…
#
# Run a command that works in FOLDER, on this machine's disk, while KEPT, such as a mounted bucket,
# has a copy: fetched first where FOLDER is empty (or was being fetched), sent every SECONDS_BETWEEN (60) and
# once more at the end, whose exit code is the command's. TERM, INT and USR1 are passed on.
#
# A run cannot work in a mounted bucket itself: its checkpoints are renamed as whole folders, which
# such mounts do not do faithfully. What was sent by halves is noticed when it is read, and the
# checkpoint before it is taken.
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
if ! command -v rsync >/dev/null; then
    echo "error: keep.sh needs rsync, which is not on PATH; install it, or nothing would be kept" >&2
    exit 2
fi
folder=${1%/} kept=$2
shift 2
mkdir -p "$folder" "$kept"
# A folder that was fetched by halves must not be taken for the whole: what it lacks is deleted there.
if [ -z "$(ls -A "$folder")" ] || [ -e "$folder.fetching" ]; then
    : >"$folder.fetching"
    rsync -rt "$kept/" "$folder/"
    rm "$folder.fetching"
fi
newest() { find "$1/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null | sed 's/.*step-//' | sort | tail -n 1; }
if [[ $(newest "$kept") > $(newest "$folder") ]]; then
    echo "error: $kept has step $(newest "$kept"), but $folder none beyond '$(newest "$folder")': the run went on" \
        "elsewhere; move $folder away to go on from the copy" >&2
    exit 2
fi

send() { # deletes last, so that KEPT never has fewer checkpoints than before
    rsync -rt --inplace --delete-after --exclude run.lock --exclude LOCK --exclude '.tmp-*' \
        "$folder/" "$kept/" || echo "keep.sh: not all was sent; again in a while" >&2
}

child=
# shellcheck disable=SC2329 # the trap calls it
pass_on() { if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null || true; fi; }
trap pass_on TERM INT USR1
"$@" &
child=$!
next=$((SECONDS + ${SECONDS_BETWEEN:-60}))
while kill -0 "$child" 2>/dev/null; do
    sleep 1 &
    wait -n "$child" $! || true # also returns when a signal arrives
    if [ "$SECONDS" -ge "$next" ]; then
        send
        next=$((SECONDS + ${SECONDS_BETWEEN:-60}))
    fi
done
code=0
wait "$child" || code=$?
send
exit "$code"
