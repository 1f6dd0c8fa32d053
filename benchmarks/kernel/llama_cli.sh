#!/bin/bash
# Stock llama.cpp programs with the attention kernel, by GGML_BACKEND_PATH: built from the source that llama-cpp-python brings.
#   benchmarks/kernel/llama_cli.sh FOLDER MODEL.gguf PYTHON        PYTHON has EdgeKV, and `edgekv kernel` has run
# cmake, ninja and a C++ compiler; FOLDER keeps source and builds (1 GB; 145 files the first time). Exit code 1: a check failed.
set -euo pipefail
folder=$1 model=$(realpath "$2") python=$3
version=0.3.36 # of pyproject.toml
plugin=$("$python" -m edgekv kernel --json | "$python" -c "import json, sys; print(json.load(sys.stdin)['path'])")
mkdir -p "$folder"
cd "$folder"
[ -d llama_cpp_python-$version ] || {
    "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python llama-cpp-python==$version
    tar xzf llama_cpp_python-$version.tar.gz
}

build() { # build NAME TARGETS OPTIONS...
    local name=$1 targets=$2
    shift 2
    cmake -S llama_cpp_python-$version/vendor/llama.cpp -B "$name" -G Ninja -DCMAKE_BUILD_TYPE=Release -DLLAMA_OPENSSL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_USE_PREBUILT_UI=OFF "$@" >"$name.log"
    # shellcheck disable=SC2086  # words
    nice ninja -C "$name" $targets >>"$name.log"
}

ask() { # ask PROGRAM OPTIONS...: the words of the model, then those of ggml
    "$@" -m "$model" -t 1 -c 512 -n 12 --temp 0 -no-cnv -p "The capital of France is" 2>ggml.log
}

failed=0
check() { # check WHAT COMMAND...
    local what=$1
    shift
    if "$@"; then echo "ok: $what"; else echo "FAILED: $what" && failed=1; fi
}

build shared "llama-completion llama-bench"
# -ot: these programs load plug-ins only for an option that names buffers or devices (docs/kernel.md).
stock=$(ask shared/bin/llama-completion -fa on)
with=$(GGML_BACKEND_PATH=$plugin GGML_SCHED_DEBUG=2 ask shared/bin/llama-completion -fa on -ot none=CPU -v)
check "llama-completion gives attention to the kernel" grep -qa "SPLIT #1: EdgeKV" ggml.log
check "the same answer as stock's: $stock" test "$stock" = "$with"
GGML_BACKEND_PATH=$plugin shared/bin/llama-bench -m "$model" -fa 1 -p 0 -n 4 -r 1 >bench.log 2>&1
check "llama-bench loads it" grep -qa "loaded EdgeKV backend" bench.log
exit $failed
