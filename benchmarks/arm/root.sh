#!/bin/bash
# Makes, once, what `make arm` runs in: a Debian arm64 root, llama.cpp for two instruction sets, and for each of these an
# environment with EdgeKV, installed by the emulated machine's own pip. Needs Debian on x86, root rights and the archives.
#   benchmarks/arm/root.sh CACHE_DIR PYTHON       PYTHON: of an environment that has pip
set -euo pipefail
cache=$1 python=$2
here=$(cd "$(dirname "$0")" && pwd)
sources=$(cd "$here/../.." && pwd)
root=$cache/root
mkdir -p "$cache"
export DEBIAN_FRONTEND=noninteractive
slowly="nice -n 1"

tools=(qemu-user qemu-user-static debootstrap g++ g++-aarch64-linux-gnu cmake ninja-build jq)
dpkg -s "${tools[@]}" >/dev/null 2>&1 || apt-get install -y --no-install-recommends "${tools[@]}"

# The kernel hands arm64 programs to QEMU. F: QEMU is opened here and now, so the root needs no copy of it.
binfmt=/proc/sys/fs/binfmt_misc
[ -e $binfmt/register ] || mount -t binfmt_misc binfmt_misc $binfmt
[ -e $binfmt/qemu-aarch64 ] || cat /usr/lib/binfmt.d/qemu-aarch64.conf >$binfmt/register

# Packages are unpacked here and not configured in there: Python and g++ need no more, and emulated dpkg takes 15 minutes.
if [ ! -e "$cache/.debian" ]; then
    echo "==> Debian bookworm for arm64"
    rm -rf "$root" && mkdir -p "$root/usr/bin" "$root/usr/sbin" "$root/usr/lib"
    for name in bin sbin lib; do ln -s usr/$name "$root/$name"; done
    ls "$cache"/debs/*.deb >/dev/null 2>&1 || {
        $slowly debootstrap --download-only --arch=arm64 --variant=minbase \
            --include=ca-certificates,python3,python3-venv,libgomp1,libstdc++6,g++ \
            bookworm "$cache/download" http://deb.debian.org/debian >"$cache/debootstrap.log" 2>&1 ||
            { tail -20 "$cache/debootstrap.log" >&2; exit 1; }
        mkdir -p "$cache/debs" && mv "$cache"/download/var/cache/apt/archives/*.deb "$cache/debs/"
        rm -rf "$cache/download"
    }
    for package in "$cache"/debs/*.deb; do $slowly dpkg-deb -x "$package" "$root"; done
    mkdir -p "$root"/{proc,sys,dev,tmp,root,models,tests,wheels,venv}
    touch "$cache/.debian"
fi

# llama.cpp from llama-cpp-python's source on PyPI, as wheels. The Cortex-A53 and A72 have one instruction set, the
# A76 has dot products. One source and one build folder serve both: only ggml's CPU library is compiled twice, and a
# build that was stopped goes on.
llama=$cache/llama.cpp
if [ ! -e "$llama/llama_cpp_python-0.3.36" ]; then
    mkdir -p "$llama"
    "$python" -m pip install --quiet scikit-build-core # pip asks the source for its name before it keeps it
    "$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary llama-cpp-python --dest "$llama" \
        llama-cpp-python==0.3.36
    tar xzf "$llama"/llama_cpp_python-0.3.36.tar.gz -C "$llama"
fi
for arch in armv8-a armv8.2-a+dotprod+fp16; do
    wheels=$llama/$arch
    compgen -G "$wheels/*.whl" >/dev/null && continue
    echo "==> llama.cpp for $arch"
    _PYTHON_HOST_PLATFORM=linux-aarch64 CMAKE_BUILD_PARALLEL_LEVEL=$(getconf _NPROCESSORS_ONLN) \
        CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
            -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
            -DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=$arch -DLLAVA_BUILD=OFF" \
        $slowly "$python" -m pip wheel --quiet --no-deps --no-cache-dir --no-build-isolation \
        --config-settings=build-dir="$llama/build" --wheel-dir "$wheels" "$llama/llama_cpp_python-0.3.36"
done

# The wheels that pip on a Raspberry Pi OS of 64 bits would take (aarch64, glibc 2.36, CPython 3.11), fetched by this
# machine's pip; llama-cpp-python's own requirements too, which its wheel cannot tell a pip that only fetches.
if [ ! -e "$cache/.wheels" ]; then
    echo "==> aarch64 wheels"
    mapfile -t requirements < <("$python" -c "import tomllib
with open('$sources/pyproject.toml', 'rb') as file: project = tomllib.load(file)['project']
print(*project['dependencies'], *project['optional-dependencies']['serve'], sep='\n')")
    $slowly "$python" -m pip download --quiet --dest "$root/wheels" --only-binary :all: \
        --platform manylinux_2_34_aarch64 --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 \
        --platform manylinux2014_aarch64 --platform linux_aarch64 --implementation cp --python-version 3.11 \
        "${requirements[@]}" typing-extensions diskcache pytest
    touch "$cache/.wheels"
fi

# As a board's user installs it: an environment, and the wheel with its extras. EdgeKV itself changes between runs:
# always the one that is checked out.
rm -f "$root"/wheels/edgekv-*.whl
$slowly "$python" -m pip wheel --quiet --no-deps --wheel-dir "$root/wheels" "$sources"
edgekv=$(basename "$root"/wheels/edgekv-*.whl)
for arch in armv8-a armv8.2-a+dotprod+fp16; do
    core=cortex-a53
    [ $arch = armv8-a ] || core=cortex-a76
    board=("$here/board.sh" "$cache" $core $arch)
    offline=(--quiet --disable-pip-version-check --no-index --no-compile --find-links /wheels)
    if [ ! -e "$cache/.installed-$arch" ]; then
        echo "==> python3 -m venv && pip install '$edgekv[llama,serve]' on an emulated $core"
        cp "$llama/$arch"/llama_cpp_python-*.whl "$root/wheels/"
        "${board[@]}" /usr/bin/python3 -m venv --clear "/venv/$arch"
        "${board[@]}" pip install "${offline[@]}" "/wheels/$edgekv[llama,serve]" pytest
        rm "$root"/wheels/llama_cpp_python-*.whl
        touch "$cache/.installed-$arch"
    else
        "${board[@]}" pip install "${offline[@]}" --no-deps --force-reinstall "/wheels/$edgekv"
    fi
done
rm -rf "$root/tests"
cp -r "$sources/tests" "$root/tests"
