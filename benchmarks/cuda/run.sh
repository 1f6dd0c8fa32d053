#!/bin/bash
# EdgeKV on a CUDA card, on a machine that reaches no network: benchmarks/cuda/README.md. In the repository's root:
#   benchmarks/cuda/run.sh build WHEELS               llama.cpp with CUDA, from the sdist in the folder WHEELS
#   benchmarks/cuda/run.sh models [ORIGINAL.gguf]     the files to measure; beside the build if need be
#   benchmarks/cuda/run.sh bench REPORTS              JSON reports into the folder REPORTS
#   benchmarks/cuda/run.sh kernels TABLES             which kernels the 1B pair spends its time in
# All of it lives in $EDGEKV_CUDA (default ~/.cache/edgekv-cuda); nothing is installed outside. $DEPTHS: as `edgekv bench -d`.
set -euo pipefail
work=${EDGEKV_CUDA:-$HOME/.cache/edgekv-cuda} sources=$(cd "$(dirname "$0")/../.." && pwd)
site=$work/site models=$work/models tree=$work/tree
pair=("$models"/llama-1b-q8_0.gguf "$models"/llama-1b-mla-256-q8_0.gguf)
mkdir -p "$site" "$models" "$tree/edgekv"
# As wheels would lay it out, from the files as they are.
for path in "$sources"/edgekv/*; do ln -sfn "$path" "$tree/edgekv/"; done
for room in quant export devices; do ln -sfn "$sources/$room" "$tree/edgekv/$room"; done

# PyTorch's wheels hold cuBLAS where the toolkit has none; the driver's library is wherever the loader finds it.
pip_cuda=$(python3 -c "import nvidia; print(*(f'{path}/cu13' for path in nvidia.__path__))" 2>/dev/null || true)
first_of() { { ls "$@" 2>/dev/null || true; } | head -1; }
toolkit=$(dirname "$(dirname "$(first_of /usr/local/cuda/bin/nvcc /usr/local/cuda-*/bin/nvcc)")")
library_of() { first_of "$toolkit"/lib64/lib"$1".so* "$toolkit"/lib/lib"$1".so* "${pip_cuda:-/none}"/lib/lib"$1".so*; }
cublas=$(library_of cublas)
cublas_lt=$(library_of cublasLt)
driver=$(first_of /usr/local/nvidia/lib*/libcuda.so* /usr/lib/x86_64-linux-gnu/libcuda.so*)
export PYTHONPATH=$tree:$site
export LD_LIBRARY_PATH=${cublas:+$(dirname "$cublas"):}$toolkit/lib64:${LD_LIBRARY_PATH:-}

build() { # build WHEELS
    local header flags
    header=$(first_of "$toolkit"/include/cublas_v2.h "${pip_cuda:-/none}"/include/cublas_v2.h)
    flags="-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=90 -DGGML_CUDA_NCCL=off -DLLAVA_BUILD=OFF
        -DCUDAToolkit_ROOT=$toolkit -DCUDA_cublas_LIBRARY=$cublas -DCUDA_cublasLt_LIBRARY=$cublas_lt
        -DCMAKE_CUDA_FLAGS=-I$(dirname "$header")
        -DCMAKE_SHARED_LINKER_FLAGS=-Wl,--exclude-libs,ALL" # README.md: a libstdc++ of its own may not be seen by others
    if [ -n "$driver" ]; then flags+=" -DCUDA_cuda_driver_LIBRARY=$driver"; else flags+=" -DGGML_CUDA_NO_VMM=ON"; fi
    python3 -m pip install --quiet --no-index --no-deps --upgrade --target "$site" "$1"/*.whl
    CUDACXX=$toolkit/bin/nvcc CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) CMAKE_ARGS="$flags ${CMAKE_ARGS:-}" \
        python3 -m pip install --no-index --no-deps --no-build-isolation --upgrade --target "$site" \
        --config-settings=build-dir="$work/build" -v "$1"/llama_cpp_python-*.tar.gz
    gpu_there
}

gpu_there() {
    python3 -c "from edgekv.backends.llama_cpp.library import llama
print('llama.cpp:', llama().llama_print_system_info().decode())
print('offloads to a card:', bool(llama().llama_supports_gpu_offload()))"
}

models() { # models [ORIGINAL.gguf]
    if [ -n "${1:-}" ]; then
        cp "$1" "$models/smollm2.gguf"
        for healed in "$sources"/models/*.safetensors; do
            name=$(basename "$healed" .safetensors)
            python3 -P -m edgekv convert "$1" -o "$models/${name/-instruct/}.gguf" --force --healed "$healed"
        done
    fi
    python3 "$sources/benchmarks/cuda/llama_1b.py" "$models"
}

there() { ls "$@" >/dev/null; } # says which are not

# One report a cache type and pair of models: each has its time, so that a slow one costs no other its report.
measure() { # measure NAME SECONDS CACHE REPEATS MODEL...
    local name=$1 seconds=$2 cache=$3 repeats=$4 started=$SECONDS
    shift 4
    there "$@" || return 0
    timeout -k 5 "$seconds" python3 -P -m edgekv bench "$@" --cache-type "$cache" -d "${DEPTHS:-0,2048,7600}" -p 512 -n 32 -r "$repeats" \
        -o "$reports/$name.json" --force >"$reports/$name.txt" 2>"$work/$name.log" ||
        { echo "$name: exit code $?"; tail -3 "$work/$name.log"; rm -f "$reports/.$name".*.partial; }
    echo "$name: $((SECONDS - started)) s"
}

bench() { # bench REPORTS
    reports=$1
    mkdir -p "$reports"
    gpu_there
    local latents=("$models"/smollm2-135m-*.gguf)
    measure cuda-llama-1b-f16 80 f16 5 "${pair[@]}"
    measure cuda-smollm2-f16 160 f16 5 "$models/smollm2.gguf" "${latents[@]}"
    # Does the card compute what the reference does?
    there "${latents[0]}" && { timeout 60 python3 -P -m edgekv verify "${latents[0]}" --cache-type f16 --text-tokens 128 \
        --tolerance 0.05 --json >"$reports/cuda-verify.json" || echo "verify: exit code $?"; }
    measure cuda-llama-1b-q8_0 60 q8_0 3 "${pair[@]}"
    measure cuda-smollm2-q8_0 60 q8_0 3 "$models/smollm2.gguf" "${latents[@]}"
    measure cuda-smollm2-q4_0 60 q4_0 3 "$models/smollm2.gguf" "${latents[@]}"
    measure cuda-llama-1b-q4_0 60 q4_0 3 "${pair[@]}"
}

# Tables of the last 100 ms, four a second (kernel_times.c): of a depth a folder, most of them in the middle of decoding.
kernels() { # kernels TABLES
    local library=$work/libkernel_times.so header cupti model depth folder
    header=$(first_of "$toolkit"/include/cupti.h "$toolkit"/extras/CUPTI/include/cupti.h "${pip_cuda:-/none}"/include/cupti.h)
    cupti=$(first_of "$toolkit"/lib64/libcupti.so* "$toolkit"/extras/CUPTI/lib64/libcupti.so* "${pip_cuda:-/none}"/lib/libcupti.so*)
    if [ ! -e "$library" ]; then
        gcc -O2 -shared -fPIC -I"$(dirname "$header")" -I"$toolkit/include" \
            -DKERNEL_RECORD="$(grep -o 'CUpti_ActivityKernel[0-9]*' "$(dirname "$header")/cupti_activity.h" | sort -V | tail -1)" \
            "$sources/benchmarks/cuda/kernel_times.c" -o "$library" "$cupti" -lpthread
    fi
    export LD_LIBRARY_PATH=$(dirname "${cupti:-/none/}"):$LD_LIBRARY_PATH
    for model in "${pair[@]}"; do
        there "$model" || continue
        for depth in $(tr , ' ' <<<"${DEPTHS:-0,7600}"); do
            folder=$1/$(basename "$model" .gguf)-$depth
            mkdir -p "$folder"
            KERNEL_TIMES=$folder CUDA_INJECTION64_PATH=$library timeout 60 python3 -P -m edgekv bench "$model" --cache-type f16 -d "$depth" \
                -p 512 -n 400 -r 3 >"$folder/bench.txt" 2>&1 || echo "$folder: exit code $?"
        done
    done
}

case ${1:-} in
    build | models | bench | kernels) "$@" ;;
    *) sed -n '2,7s/^# //p' "$0" >&2; exit 2 ;;
esac
