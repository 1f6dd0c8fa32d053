// Random attention problems, to be run under sanitizers. Buffers are exactly as large as the tensors in them.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "attention.h"

using edgekv::Type;

int main() {
    std::mt19937 random(1);
    auto         pick = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random); };
    const Type   types[] = {Type::f32, Type::f16, Type::bf16, Type::q8_0, Type::q5_1, Type::q5_0, Type::q4_1,
                                  Type::q4_0, Type::iq4_nl};
    int          done = 0;
    for (int round = 0; round < 4; round++) {
        for (Type type : types) {
            edgekv::Problem p{};
            p.n_seq = pick(1, 2), p.n_kv_heads = pick(1, 3), p.n_heads = p.n_kv_heads * pick(1, 9);
            p.n_tokens = pick(1, 40), p.n_rows = pick(1, 1300), p.width_k = 32 * pick(1, 9), p.width_v = 32 * pick(1, 9);
            p.shared = p.n_kv_heads == 1 && pick(0, 1) == 1;
            if (p.shared) p.width_v = 32 * pick(1, p.width_k / 32);
            p.rows_k = p.rows_v = edgekv::rows_of(type);
            const size_t row_k = edgekv::row_nbytes(*p.rows_k, p.width_k), row_v = edgekv::row_nbytes(*p.rows_v, p.width_v);
            const auto   n_rows = size_t(p.n_seq * p.n_kv_heads * p.n_rows);
            std::vector<float>    q(size_t(p.n_seq * p.n_heads * p.n_tokens * p.width_k), 0.1f);
            std::vector<char>     k(n_rows * row_k, 1), v(p.shared ? 0 : n_rows * row_v, 1);
            std::vector<uint16_t> mask(size_t(p.n_tokens * p.n_rows), 0);
            for (auto & m : mask) m = pick(0, 3) == 0 ? 0xfc00 : 0;
            std::vector<float> out(size_t(p.n_seq * p.n_tokens * p.n_heads * p.width_v));
            auto view = [](const void * data, size_t row, int64_t rows, int64_t heads) {
                return edgekv::View{static_cast<const char *>(data), row, row * size_t(rows), row * size_t(rows * heads)};
            };
            p.q    = view(q.data(), size_t(p.width_k) * sizeof(float), p.n_tokens, p.n_heads);
            p.k    = view(k.data(), row_k, p.n_rows, p.n_kv_heads);
            p.v    = p.shared ? p.k : view(v.data(), row_v, p.n_rows, p.n_kv_heads);
            p.mask = pick(0, 1) ? view(mask.data(), size_t(p.n_rows) * 2, p.n_tokens, 1) : edgekv::View{};
            p.mask_heads = p.mask_seq = 1;
            p.out   = out.data();
            p.scale = 0.1f;
            edgekv::Scratch scratch;
            edgekv::attention(p, int(pick(1, 3)), scratch);
            done++;
        }
    }
    std::printf("%d problems\n", done);
    return 0;
}
