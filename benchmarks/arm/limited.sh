#!/bin/bash
# Runs a command in so much memory and no swap: limited.sh MIB COMMAND...      Needs root. Cgroup v2, or v1 with memsw.
# Tells the peak that the kernel counted and whether it killed anything, on standard error.
set -uo pipefail
mib=$1
shift
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    group=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)/edgekv-$$
    limits=(memory.max) peak=memory.peak kills=memory.events
else
    group=/sys/fs/cgroup/memory$(sed -n 's/^[0-9]*:memory://p' /proc/self/cgroup)/edgekv-$$
    limits=(memory.limit_in_bytes memory.memsw.limit_in_bytes) peak=memory.memsw.max_usage_in_bytes kills=memory.oom_control
fi
# Files that lie in the page cache already would count against nobody here: models are dropped from it.
for word in "$@"; do [ -f "$word" ] && dd if="$word" iflag=nocache count=0 status=none; done
mkdir "$group" || exit 1
trap : TERM INT # for the command; the peak is told afterwards
for limit in "${limits[@]}"; do echo $((mib << 20)) >"$group/$limit"; done
[ -e "$group/memory.swap.max" ] && echo 0 >"$group/memory.swap.max"
(
    echo $BASHPID >"$group/cgroup.procs"
    exec "$@"
)
code=$?
echo "limit $mib MiB, peak $(($(cat "$group/$peak") >> 20)) MiB, $(grep -E '^oom_kill ' "$group/$kills"), exit code $code" >&2
rmdir "$group"
exit $code
