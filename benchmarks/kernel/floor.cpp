// Times of the kernel and of what bounds it on this machine; benchmarks/kernel/floor.py builds and runs it.
//
//   floor peaks THREADS                                         f32 and int8 multiply-adds/s, bytes read/s
//   floor node THREADS TYPE HEADS KV_HEADS K V TOKENS ROWS LAYERS    ns per cached row, layer and token; whether in int8
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "attention.h"
#include "vectors.h"

using namespace edgekv;

namespace {

constexpr double BUDGET_S = 0.5;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Best rate of `work` per call of f on every thread, called over and over for a while.
template <class F>
double best_rate(int threads, double work, F && f) {
    double best = 0;
    for (const double end = now() + BUDGET_S; now() < end;) {
        const double start = now();
#pragma omp parallel num_threads(threads)
        f(omp_get_thread_num());
        best = std::max(best, work * threads / (now() - start));
    }
    return best;
}

std::vector<float> sink(1024);

template <int N>
double f32_rate(int threads) {
    constexpr int64_t STEPS = 1'000'000;
    return best_rate(threads, double(STEPS * N * LANES), [](int thread) {
        vf sum[N], factor = all(0.5f + 0 * sink[size_t(thread)]), more = all(float(thread));
        for (int i = 0; i < N; i++) sum[i] = all(float(i));
        for (int64_t step = 0; step < STEPS; step++) {
            for (int i = 0; i < N; i++) sum[i] = sum[i] * factor + more;
        }
        for (int i = 1; i < N; i++) sum[0] += sum[i];
        sink[size_t(thread) * 16] = sum[0][0];
    });
}

// The kernel's own products of whole numbers, from the L1 cache.
template <int N>
double int8_rate(int threads) {
    constexpr int64_t STEPS = 200'000;
    return best_rate(threads, double(STEPS * N * LANES * QK), [](int thread) {
        alignas(64) uint8_t keys[QK * LANES];
        int8_t queries[N * QK];
        std::fill(keys, keys + sizeof keys, uint8_t(thread + 1)), std::fill(queries, queries + sizeof queries, int8_t(1));
        vi dot[N] = {};
        for (int64_t step = 0; step < STEPS; step++) {
            asm volatile("" ::: "memory");
            add_dots<N>(keys, queries, QK, dot);
        }
        for (int i = 1; i < N; i++) dot[0] += dot[i];
        sink[size_t(thread) * 16] = float(dot[0][0]);
    });
}

double read_rate(int threads) {
    const size_t                       each = (size_t(512) << 20) / sizeof(uint64_t) / size_t(threads);
    std::vector<std::vector<uint64_t>> parts(size_t(threads), std::vector<uint64_t>(each, 1));
    return best_rate(threads, double(each * sizeof(uint64_t)), [&](int thread) {
        uint64_t sum[8] = {};
        for (size_t i = 0; i + 8 <= each; i += 8) {
            for (size_t j = 0; j < 8; j++) sum[j] += parts[size_t(thread)][i + j];
        }
        for (size_t j = 1; j < 8; j++) sum[0] += sum[j];
        sink[size_t(thread) * 16] = float(sum[0]);
    });
}

View view(const void * data, size_t row, int64_t rows, int64_t heads) {
    return {static_cast<const char *>(data), row, row * size_t(rows), row * size_t(rows * heads)};
}

void node(const std::vector<int64_t> & n) {
    Problem p{};
    p.rows_k = p.rows_v = rows_of(Type(n[1]));
    p.n_heads = n[2], p.n_kv_heads = n[3], p.width_k = n[4], p.width_v = n[5], p.n_tokens = n[6], p.n_rows = n[7];
    p.n_seq = p.mask_heads = p.mask_seq = 1;
    p.shared = p.n_kv_heads == 1, p.scale = 0.1f;
    const size_t layers = size_t(n[8]), row_k = row_nbytes(*p.rows_k, p.width_k), row_v = row_nbytes(*p.rows_v, p.width_v);
    const size_t rows = size_t(p.n_kv_heads * p.n_rows);
    // Any bytes but those of numbers that are not normal; rows of all KV heads side by side, as llama.cpp's cache has them.
    std::vector<uint8_t> k(layers * rows * row_k, 0x11), v(p.shared ? 0 : layers * rows * row_v, 0x11);
    std::vector<float>   q(size_t(p.n_tokens * p.n_heads * p.width_k), 1.0f), out(size_t(p.n_tokens * p.n_heads * p.width_v));
    p.q   = view(q.data(), size_t(p.width_k) * sizeof(float), p.n_tokens, p.n_heads);
    p.out = out.data();
    Scratch             scratch;
    std::vector<double> passes;
    for (const double end = now() + 4 * BUDGET_S; passes.size() < 3 || now() < end;) {
        const double start = now();
        for (size_t i = 0; i < layers; i++) {
            p.k = {reinterpret_cast<const char *>(k.data() + i * rows * row_k), row_k * size_t(p.n_kv_heads), row_k, 0};
            p.v = p.shared ? p.k : View{reinterpret_cast<const char *>(v.data() + i * rows * row_v), row_v * size_t(p.n_kv_heads), row_v, 0};
            attention(p, int(n[0]), scratch);
        }
        passes.push_back(now() - start);
    }
    std::sort(passes.begin(), passes.end());
    const double each = 1e9 / (double(layers) * double(p.n_rows) * double(p.n_tokens));
    std::printf("{\"ns\": %.6g, \"whole\": %s}\n", passes[passes.size() / 2] * each, p.rows_k->to_codes ? "true" : "false");
}

}  // namespace

int main(int argc, char ** argv) {
    std::vector<int64_t> numbers;
    for (int i = 2; i < argc; i++) numbers.push_back(std::atoll(argv[i]));
    if (argc == 3 && std::strcmp(argv[1], "peaks") == 0) {
        const int threads = int(numbers[0]);
        std::printf("{\"f32\": %.6g, \"int8\": %.6g, \"read\": %.6g}\n", std::max(f32_rate<8>(threads), f32_rate<12>(threads)),
                    std::max({int8_rate<2>(threads), int8_rate<3>(threads), int8_rate<6>(threads)}), read_rate(threads));
    } else if (argc == 11 && std::strcmp(argv[1], "node") == 0) {
        node(numbers);
    } else {
        return 2;
    }
    return 0;
}
