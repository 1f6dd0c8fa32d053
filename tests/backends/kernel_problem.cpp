// One attention problem from standard input to standard output: for sanitizers and for other CPUs, without ggml.
//
// Input: 14 numbers (sequences, H, G, T, S, K, V, type of K, of V, shared, mask's heads or 0, mask's sequences, threads,
// whether the mass of rows is wanted) as int64, scale and softcap as float32, then q, k, v unless shared, the mask, all
// contiguous, and a byte and H floats of sinks.
// Output: whether queries are rounded, as a byte, the output and the mass of each row.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "attention.h"

using edgekv::View;

template <class T>
static std::vector<T> read(int64_t n) {
    std::vector<T> x(static_cast<size_t>(n));
    if (n && std::fread(x.data(), sizeof(T), x.size(), stdin) != x.size()) std::exit(2);
    return x;
}

static View view(const void * data, size_t row, int64_t rows, int64_t heads) {
    return {static_cast<const char *>(data), row, row * static_cast<size_t>(rows), row * static_cast<size_t>(rows * heads)};
}

int main() {
    edgekv::Problem p{};
    const auto      n       = read<int64_t>(14);
    const auto      factors = read<float>(2);
    p.n_seq = n[0], p.n_heads = n[1], p.n_kv_heads = n[2], p.n_tokens = n[3], p.n_rows = n[4], p.width_k = n[5], p.width_v = n[6];
    p.rows_k = edgekv::rows_of(static_cast<edgekv::Type>(n[7]));
    p.rows_v = edgekv::rows_of(static_cast<edgekv::Type>(n[8]));
    p.shared = n[9] != 0, p.mask_heads = n[10], p.mask_seq = n[11];
    p.scale = factors[0], p.softcap = factors[1];

    const int64_t rows  = p.n_seq * p.n_kv_heads * p.n_rows;
    const size_t  row_k = edgekv::row_nbytes(*p.rows_k, p.width_k), row_v = edgekv::row_nbytes(*p.rows_v, p.width_v);
    const auto    q     = read<float>(p.n_seq * p.n_heads * p.n_tokens * p.width_k);
    const auto    k     = read<uint8_t>(rows * static_cast<int64_t>(row_k));
    const auto    v     = read<uint8_t>(p.shared ? 0 : rows * static_cast<int64_t>(row_v));
    const auto    mask  = read<uint16_t>(p.mask_seq * p.mask_heads * p.n_tokens * p.n_rows);
    const bool    sunk  = read<uint8_t>(1)[0] != 0;
    const auto    sinks = read<float>(sunk ? p.n_heads : 0);
    p.q     = view(q.data(), static_cast<size_t>(p.width_k) * sizeof(float), p.n_tokens, p.n_heads);
    p.k     = view(k.data(), row_k, p.n_rows, p.n_kv_heads);
    p.v     = p.shared ? p.k : view(v.data(), row_v, p.n_rows, p.n_kv_heads);
    p.sinks = sunk ? sinks.data() : nullptr;
    if (p.mask_heads) p.mask = view(mask.data(), static_cast<size_t>(p.n_rows) * 2, p.n_tokens, p.mask_heads);
    if (!p.mask_heads) p.mask_heads = p.mask_seq = 1;

    std::vector<float> out(static_cast<size_t>(p.n_seq * p.n_tokens * p.n_heads * p.width_v));
    std::vector<float> mass(static_cast<size_t>(p.n_rows));
    p.out  = out.data();
    p.mass = n[13] ? mass.data() : nullptr;
    edgekv::Scratch scratch;
    edgekv::attention(p, static_cast<int>(n[12]), scratch);
    const uint8_t rounds = uint8_t(rounding(*p.rows_k) | (rounding(*p.rows_v) & 2));
    if (std::fwrite(&rounds, 1, 1, stdout) != 1) return 3;
    for (const auto & x : {out, mass}) {
        if (std::fwrite(x.data(), sizeof(float), x.size(), stdout) != x.size()) return 3;
    }
    return 0;
}
