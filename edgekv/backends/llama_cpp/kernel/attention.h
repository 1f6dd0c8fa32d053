// Attention over a cache whose rows are read once for all heads and tokens of a batch.
//
// Letters as in edgekv/spec.py: T tokens, S cached rows, H query heads, G KV heads, K and V widths of keys and values.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rows.h"

namespace edgekv {

// A tensor of up to four dims: bytes from one element of dims 1 to 3 to the next, as ggml's nb. Rows are contiguous.
struct View {
    const char * data;
    size_t       nb1, nb2, nb3;
};

struct Problem {
    View          q;      // (sequences, H, T, K) float32
    View          k;      // (sequences, G, S, K)
    View          v;      // (sequences, G, S, V); the first V values of k's rows where `shared`
    View          mask;   // (sequences or 1, H or 1, T, S) float16, added to the scores; data null: none
    const float * sinks;  // (H) a score that takes part in each softmax and has no value, or null
    float *       out;    // (sequences, T, H, V) contiguous
    int64_t       n_seq, n_heads, n_kv_heads, n_tokens, n_rows, width_k, width_v;
    int64_t       mask_heads, mask_seq;
    const Rows *  rows_k;
    const Rows *  rows_v;
    bool          shared;
    float         scale, softcap;  // softcap 0: none
    float *       mass;            // (S) to which the softmax weights that each row got from all queries are added, or null
};

// Threads' scratch memory, kept from call to call.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch &) = delete;
    Scratch & operator=(const Scratch &) = delete;
    ~Scratch();
    // At least n floats, aligned to 64 bytes; what was there before may be lost.
    float * reserve(size_t n);

private:
    float * data_ = nullptr;
    size_t  size_ = 0;
};

void attention(const Problem & problem, int n_threads, Scratch & scratch);

}  // namespace edgekv
