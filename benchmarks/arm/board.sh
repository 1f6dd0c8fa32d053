#!/bin/bash
# Runs a command in the emulated root as on one core: board.sh CACHE CORE LLAMA_CPP_ARCH COMMAND...
# CORE: cortex-a53 (Zero 2 W, 3B+), cortex-a72 (4) or cortex-a76 (5). LLAMA_CPP_ARCH: an environment that root.sh made.
set -euo pipefail
root=$1/root core=$2 arch=$3
shift 3
case $core in
    cortex-a53) part=0xd03 flags="fp asimd evtstrm crc32 cpuid" ;;
    cortex-a72) part=0xd08 flags="fp asimd evtstrm crc32 cpuid" ;;
    cortex-a76) part=0xd0b flags="fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp" ;;
    *) echo "$core is not one of cortex-a53, cortex-a72, cortex-a76" >&2; exit 2 ;;
esac
# onnxruntime's CPU detection crashes on the host's cpuinfo, which QEMU 7.2 passes through; g++ -mcpu=native wants the
# variant too, and without it compiles for any armv8-a.
cpuinfo=$(mktemp)
trap 'rm -f "$cpuinfo"' EXIT
trap : TERM INT # for the command; this shell then ends with its exit code
for ((cpu = 0; cpu < $(getconf _NPROCESSORS_ONLN); cpu++)); do
    printf 'processor\t: %d\nBogoMIPS\t: 108.00\nFeatures\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: %s\nCPU revision\t: 4\n\n' \
        $cpu "$flags" $part
done >"$cpuinfo"
unshare --mount bash -ec '
    root=$1 cpuinfo=$2
    shift 2
    mount -t proc proc "$root/proc"
    mount --bind "$cpuinfo" "$root/proc/cpuinfo"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    exec chroot "$root" /usr/bin/env -i "$@"
' _ "$root" "$cpuinfo" PATH="/venv/$arch/bin:/usr/bin:/bin" HOME=/root LANG=C.UTF-8 QEMU_CPU=$core OMP_NUM_THREADS=1 \
    OPENBLAS_NUM_THREADS=1 "$@"
