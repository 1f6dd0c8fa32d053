#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "vectors.h"

namespace edgekv {
namespace {

constexpr int64_t TILE    = 64;   // cached rows at a time
constexpr int64_t BLOCK   = 72;   // rows of queries at a time: heads times tokens
constexpr int     R       = 4;    // cached rows in registers
constexpr int64_t PADDING = 16;   // floats behind a row of the tile: rows a power of two apart would share sets of the L1 cache
constexpr int64_t CHUNK   = 128;  // least cached rows that one thread takes
constexpr float   NOTHING = -std::numeric_limits<float>::infinity();

// Rows of queries in registers at a time, by what was fastest: x86 without AVX-512 has 16 registers, the others 32.
#if defined(__x86_64__) && !defined(__AVX512F__)
constexpr int DOTS = 2, WHOLE_DOTS = 3, MIXED = 6;
constexpr int columns(int n) { return n > 4 ? 2 : 4; }  // vectors of values beside n rows
constexpr bool has_registers(int n) { return n != 4; }
#else
constexpr int DOTS = 6, WHOLE_DOTS = 6, MIXED = 6;
constexpr int columns(int) { return 4; }
constexpr bool has_registers(int) { return true; }
#endif
constexpr int PAIR_DOTS = 9, PAIR_MIXED = 9;  // of AVX-512 alone
constexpr int pair_columns(int n) { return n > 6 ? 3 : 4; }

template <int N> struct Count { static constexpr int value = N; };

// f(Count<n>, r) for rows r..r+n of from..to, n at most MOST.
template <int MOST, class F>
inline void in_groups(int64_t from, int64_t to, F && f) {
    for (int64_t r = from; r < to;) {
        int n = int(std::min<int64_t>(MOST, to - r));
        if (!has_registers(n)) n /= 2;
        switch (n) {
            case 9: if constexpr (MOST >= 9) f(Count<9>(), r); break;
            case 8: if constexpr (MOST >= 8) f(Count<8>(), r); break;
            case 7: if constexpr (MOST >= 7) f(Count<7>(), r); break;
            case 6: if constexpr (MOST >= 6) f(Count<6>(), r); break;
            case 5: if constexpr (MOST >= 5) f(Count<5>(), r); break;
            case 4: if constexpr (MOST >= 4) f(Count<4>(), r); break;
            case 3: if constexpr (MOST >= 3) f(Count<3>(), r); break;
            case 2: f(Count<2>(), r); break;
            default: f(Count<1>(), r);
        }
        r += n;
    }
}

// scores[N][R] = q[N] . k[R], the widths padded with zeros.
template <int N>
inline void dots(const float * q, const float * k, int64_t width, int64_t k_stride, float * scores) {
    vf sum[N][R] = {};
    for (int64_t d = 0; d < width; d += LANES) {
        vf row[R];
        for (int r = 0; r < R; r++) row[r] = load(k + r * k_stride + d);
        for (int i = 0; i < N; i++) {
            const vf x = load(q + i * width + d);
            for (int r = 0; r < R; r++) sum[i][r] += x * row[r];
        }
    }
    for (int i = 0; i < N; i++) sums_of_four(sum[i], scores + i * TILE);
}

// Queries in 8 bits as ggml's q8_0 rounds them (https://github.com/ggml-org/ggml, quantize_row_q8_0), which is what stock
// llama.cpp multiplies a quantized cache by.
struct WholeQueries {
    int8_t *  codes;   // (rows, width)
    float *   d;       // (rows, blocks)
    int32_t * moved;   // (rows, blocks) minus the sum of a block's codes times the offset of the keys' codes
    float *   sum;     // (rows, blocks) d times the sum of a block's codes, for minima of keys
};

// LANES keys as whole numbers, side by side: codes (width / 4, LANES, 4), d and m (block, LANES).
struct WholeKeys {
    uint8_t * codes;
    float *   d;
    float *   m;
};

// scores[N][LANES] = q[N] . k
template <int N>
inline void whole_dots(const WholeQueries & q, int64_t r, const WholeKeys & k, int64_t n_blocks, bool minima, float * scores) {
    const int64_t width = n_blocks * QK;
    vf            sum[N] = {};
    for (int64_t b = 0; b < n_blocks; b++) {
        vi dot[N];
        for (int i = 0; i < N; i++) dot[i] = all(q.moved[(r + i) * n_blocks + b]);
        add_dots<N>(k.codes + b * QK * LANES, q.codes + r * width + b * QK, width, dot);
        const vf scale = load(k.d + b * LANES);
        for (int i = 0; i < N; i++) sum[i] += __builtin_convertvector(dot[i], vf) * (scale * q.d[(r + i) * n_blocks + b]);
        if (minima) {
            const vf least = load(k.m + b * LANES);
            for (int i = 0; i < N; i++) sum[i] += least * q.sum[(r + i) * n_blocks + b];
        }
    }
    for (int i = 0; i < N; i++) store(scores + i * TILE, sum[i]);
}

// out[N][M vectors] += p[N][n_rows] v[n_rows][M vectors]
template <int N, int M>
inline void mix(const float * p, const float * v, int64_t v_stride, int64_t n_rows, float * out, int64_t o_stride) {
    vf sum[N][M];
    for (int i = 0; i < N; i++) {
        for (int c = 0; c < M; c++) sum[i][c] = load(out + i * o_stride + c * LANES);
    }
    for (int64_t r = 0; r < n_rows; r++) {
        vf row[M];
        for (int c = 0; c < M; c++) row[c] = load(v + r * v_stride + c * LANES);
        for (int i = 0; i < N; i++) {
            const vf x = all(p[i * TILE + r]);
            for (int c = 0; c < M; c++) sum[i][c] += x * row[c];
        }
    }
    for (int i = 0; i < N; i++) {
        for (int c = 0; c < M; c++) store(out + i * o_stride + c * LANES, sum[i][c]);
    }
}

// Stretches of keys and values that are wanted a tile from now. They are fetched line by line while others are multiplied:
// where all are asked for at once, what is computed meanwhile waits for them.
class Ahead {
public:
    Ahead() = default;
    Ahead(const uint8_t * keys, size_t keys_nbytes, const uint8_t * values, size_t values_nbytes)
        : parts_{{keys, keys + keys_nbytes}, {values, values + values_nbytes}} {}

    void fetch(int n_lines) {
        for (auto & [at, end] : parts_) {
            for (; at < end && n_lines > 0; n_lines--, at += 64) __builtin_prefetch(at);
        }
    }

private:
    struct {
        const uint8_t *at, *end;
    } parts_[2] = {};
};

// scores[N][LANES] = q[N] . k of one group: keys (n_pairs, LANES), queries (rows, n_pairs).
template <int N>
inline void pair_dots(const int32_t * q, const int32_t * k, int64_t n_pairs, float * scores, Ahead & ahead) {
    constexpr int WAYS = N < 3 ? 4 : N < 6 ? 2 : 1;  // sums beside each other: one product waits for the last
    vf sum[N][WAYS] = {};
    for (int64_t d = 0; d < n_pairs; d += WAYS) {
        for (int w = 0; w < WAYS; w++) {
            ahead.fetch(1);
            const vi row = load(k + (d + w) * LANES);
            for (int i = 0; i < N; i++) sum[i][w] = add_products(sum[i][w], row, all(q[i * n_pairs + d + w]));
        }
    }
    for (int i = 0; i < N; i++) {
        for (int w = 1; w < WAYS; w++) sum[i][0] += sum[i][w];
        store(scores + i * TILE, sum[i][0]);
    }
}

// out[N][M vectors] += p[N][n_pairs] v[n_pairs][M vectors], in pairs of rows.
template <int N, int M>
inline void pair_mix(const int32_t * p, const int32_t * v, int64_t v_stride, int64_t n_pairs, float * out, int64_t o_stride, Ahead & ahead) {
    vf sum[N][M];
    for (int i = 0; i < N; i++) {
        for (int c = 0; c < M; c++) sum[i][c] = load(out + i * o_stride + c * LANES);
    }
    for (int64_t r = 0; r < n_pairs; r++) {
        vi row[M];
        ahead.fetch(4);
        for (int c = 0; c < M; c++) row[c] = load(v + r * v_stride + c * LANES);
        for (int i = 0; i < N; i++) {
            const vi x = all(p[i * TILE + r]);
            for (int c = 0; c < M; c++) sum[i][c] = add_products(sum[i][c], row[c], x);
        }
    }
    for (int i = 0; i < N; i++) {
        for (int c = 0; c < M; c++) store(out + i * o_stride + c * LANES, sum[i][c]);
    }
}

// ---- one block of queries against a stretch of the cache ----

struct Sizes {
    int64_t group;                // query heads that share a KV head
    bool    whole, key_pairs;     // scores by whole numbers, or by pairs of bfloat16
    bool    value_pairs;          // values in pairs of bfloat16
    bool    apart;                // values are read by themselves, not as the first of the keys
    int64_t step;                 // cached rows whose scores are made at a time
    int64_t width_k, width_v;     // padded to whole vectors
    int64_t n_blocks;             // of a key
    int64_t stride_k, stride_v;   // of the tile's rows
    size_t  q, scores, k, v;      // floats of a thread's scratch

    explicit Sizes(const Problem & p) {
        group    = p.n_heads / p.n_kv_heads;
        width_k  = up(p.width_k, LANES);
        width_v  = up(p.width_v, LANES);
        n_blocks = p.width_k / QK;
        whole       = p.rows_k->to_codes != nullptr;
        key_pairs   = p.rows_k->to_key_pairs && p.width_k % (2 * LANES) == 0;
        value_pairs = p.rows_v->to_value_pairs && p.width_v % LANES == 0;
        apart    = !p.shared || whole || key_pairs || value_pairs;
        step     = whole || key_pairs ? LANES : R;
        stride_k = width_k + PADDING;
        stride_v = apart ? width_v + PADDING : stride_k;
        q        = size_t(whole ? BLOCK * (width_k / 4 + 3 * n_blocks) : BLOCK * width_k / (key_pairs ? 2 : 1));
        scores   = size_t(BLOCK * TILE);
        k        = size_t(whole ? LANES * (width_k / 4 + 2 * n_blocks) : key_pairs ? LANES * width_k / 2 : TILE * stride_k);
        v        = size_t(apart ? TILE * stride_v / (value_pairs ? 2 : 1) : 0);
        for (size_t * n : {&q, &scores, &k, &v}) *n = size_t(up(int64_t(*n), 16));
    }
    size_t floats() const { return q + scores + k + v; }
};

// A block of queries of one sequence, and what they have seen so far: of each of `heads` KV heads from kv_head on the rows
// first..first+rows of its T * group rows (token, head). Several heads come in one block where they all fit: the cache
// holds their rows side by side, and memory is read in order.
struct Block {
    int64_t seq, kv_head, heads, first, rows, count;  // count = heads * rows
    float * out;                         // (count, width_v)
    float * largest;                     // (count) of the scores
    float * sum;                         // (count) of exp(score - largest)
};

class Worker {
public:
    Worker(const Problem & p, const Sizes & s, float * scratch)
        : p_(p), s_(s), q_(scratch), scores_(q_ + s.q), k_(scores_ + s.scores), v_(s.apart ? k_ + s.k : k_) {
        auto * codes = reinterpret_cast<int8_t *>(q_);
        auto * after = q_ + BLOCK * s.width_k / 4;
        whole_q_     = {codes, after, reinterpret_cast<int32_t *>(after + BLOCK * s.n_blocks), after + 2 * BLOCK * s.n_blocks};
        after        = k_ + LANES * s.width_k / 4;
        whole_k_     = {reinterpret_cast<uint8_t *>(k_), after, after + LANES * s.n_blocks};
    }

    void run(const Block & b, int64_t from, int64_t to) {
        read_queries(b);
        std::fill(b.out, b.out + b.count * s_.width_v, 0.0f);
        std::fill(b.largest, b.largest + b.count, NOTHING);
        std::fill(b.sum, b.sum + b.count, 0.0f);
        for (int64_t start = from; start < to; start += TILE) {
            const int64_t n = n_seen(b, start, std::min(TILE, to - start));
            if (n == 0) continue;
            for (int64_t h = 0; h < b.heads; h++) {
                Ahead ahead = rows_ahead(b, h, start + TILE, to);
                for (int64_t i = 0; i < n; i += s_.step) {
                    const int64_t count = std::min(s_.step, n - i);
                    read_keys(b, h, start, i, count);
                    read_values(b, h, start, i, count);
                    score(b, h, i, ahead);
                }
                for (int64_t r = h * b.rows; r < (h + 1) * b.rows; r++) weigh(b, r, start, n);
                add_values(b, h, n, ahead);
            }
        }
    }

    // Adds to p.mass what the rows from..to got from each query, of which `softmax` (sequences, T, H, 2) holds the largest
    // score and one over the sum. The scores are made a second time: nobody kept them.
    void add_mass(const Block & b, const float * softmax, int64_t from, int64_t to) {
        read_queries(b);
        for (int64_t start = from; start < to; start += TILE) {
            const int64_t n = n_seen(b, start, std::min(TILE, to - start));
            if (n == 0) continue;
            float total[TILE] = {};
            for (int64_t h = 0; h < b.heads; h++) {
                for (int64_t i = 0; i < n; i += s_.step) {
                    read_keys(b, h, start, i, std::min(s_.step, n - i));
                    Ahead none;
                    score(b, h, i, none);
                }
                for (int64_t r = h * b.rows; r < (h + 1) * b.rows; r++) {
                    const float * x = softmax + 2 * ((b.seq * p_.n_tokens + token(b, r)) * p_.n_heads + head(b, r));
                    masked_scores(b, r, start, n);
                    for (int64_t i = 0; i < n && x[1] > 0; i += LANES) {
                        store(total + i, load(total + i) + exp_negative(load(scores_ + r * TILE + i) - x[0]) * x[1]);
                    }
                }
            }
            for (int64_t i = 0; i < n; i++) p_.mass[start + i] += total[i];
        }
    }

private:
    const Problem & p_;
    const Sizes &   s_;
    float *         q_;
    float *         scores_;
    float *         k_;
    float *         v_;
    WholeQueries    whole_q_;
    WholeKeys       whole_k_;
    float           added_[TILE];  // the mask of the token and stretch that weigh() saw last

    int64_t token(const Block & b, int64_t r) const { return (b.first + r % b.rows) / s_.group; }
    int64_t head(const Block & b, int64_t r) const { return (b.kv_head + r / b.rows) * s_.group + (b.first + r % b.rows) % s_.group; }

    const uint16_t * mask(const Block & b, int64_t r, int64_t start) const {
        const View & m = p_.mask;
        if (!m.data) return nullptr;
        const char * at = m.data + size_t(token(b, r)) * m.nb1 + size_t(head(b, r) % p_.mask_heads) * m.nb2 +
                          size_t(b.seq % p_.mask_seq) * m.nb3;
        return reinterpret_cast<const uint16_t *>(at) + start;
    }

    const uint8_t * row(const View & x, const Block & b, int64_t h, int64_t i) const {
        return reinterpret_cast<const uint8_t *>(x.data + size_t(i) * x.nb1 + size_t(b.kv_head + h) * x.nb2 +
                                                 size_t(b.seq) * x.nb3);
    }

    void read_queries(const Block & b) {
        for (int64_t r = 0; r < b.count; r++) {
            const char * at = p_.q.data + size_t(token(b, r)) * p_.q.nb1 + size_t(head(b, r)) * p_.q.nb2 + size_t(b.seq) * p_.q.nb3;
            const auto * from = reinterpret_cast<const float *>(at);
            if (s_.whole) {
                for (int64_t i = 0; i < s_.n_blocks; i++) round_block(from + i * QK, r, i);
            } else if (s_.key_pairs) {
                store_pairs(from, pairs(q_) + r * s_.width_k / 2, s_.width_k);
            } else {
                float * to = q_ + r * s_.width_k;
                std::copy(from, from + p_.width_k, to);
                std::fill(to + p_.width_k, to + s_.width_k, 0.0f);
            }
        }
    }

    void round_block(const float * from, int64_t r, int64_t i) {
        float most = 0;
        for (int64_t j = 0; j < QK; j++) most = std::max(most, std::fabs(from[j]));
        const float d = most / 127, inverse = most > 0 ? 127 / most : 0.0f;
        int8_t *    to  = whole_q_.codes + r * s_.width_k + i * QK;
        int32_t     sum = 0;
        for (int64_t j = 0; j < QK; j++) {
            to[j] = int8_t(std::lrintf(from[j] * inverse));
            sum += to[j];
        }
        const int64_t at = r * s_.n_blocks + i;
        whole_q_.d[at]     = d;
        whole_q_.moved[at] = -sum * p_.rows_k->offset;
        whole_q_.sum[at]   = d * float(sum);
    }

    // How many of n rows there are up to the last one that any query of the block sees. Masks are of tokens, or of tokens and
    // heads.
    int64_t n_seen(const Block & b, int64_t start, int64_t n) const {
        if (!p_.mask.data) return n;
        const int64_t step = p_.mask_heads == 1 ? s_.group : 1, rows = p_.mask_heads == 1 ? b.rows : b.count;
        int64_t       found = 0;
        for (int64_t r = 0; r < rows; r += step) found = last_seen(mask(b, r, start), found, n);
        // A block that began within a token: its last one was not looked at.
        return step > 1 && b.first % step != 0 ? last_seen(mask(b, rows - 1, start), found, n) : found;
    }

    // One more than the last index below n that is seen; at least `found`.
    static int64_t last_seen(const uint16_t * mask, int64_t found, int64_t n) {
        while (n > found && mask[n - 1] == 0xfc00) n--;  // minus infinity
        return n;
    }

    // Rows start+i..start+i+count, as `score` wants them next.
    void read_keys(const Block & b, int64_t h, int64_t start, int64_t i, int64_t count) {
        const uint8_t * from = row(p_.k, b, h, start + i);
        if (s_.whole) {
            p_.rows_k->to_codes(from, p_.k.nb1, int(count), whole_k_.codes, whole_k_.d, whole_k_.m, p_.width_k);
        } else if (s_.key_pairs) {
            p_.rows_k->to_key_pairs(from, p_.k.nb1, int(count), pairs(k_), p_.width_k);
        } else {
            read_floats(*p_.rows_k, from, p_.k.nb1, count, p_.width_k, k_ + i * s_.stride_k, s_.stride_k, s_.width_k);
        }
    }

    // The same rows' values, for `add_values` behind the whole tile.
    void read_values(const Block & b, int64_t h, int64_t start, int64_t i, int64_t count) {
        if (!s_.apart) return;
        const uint8_t * from = row(p_.v, b, h, start + i);
        if (s_.value_pairs) {
            for (int64_t j = 0; j < count; j += 2) {
                const uint8_t * next = from + (j + 1 < count ? p_.v.nb1 : 0);  // the last of an odd number: nobody sees its other half
                p_.rows_v->to_value_pairs(from, next, pairs(v_) + (i + j) / 2 * s_.stride_v, p_.width_v);
                from += 2 * p_.v.nb1;
            }
        } else {
            read_floats(*p_.rows_v, from, p_.v.nb1, count, p_.width_v, v_ + i * s_.stride_v, s_.stride_v, s_.width_v);
        }
    }

    // The h-th part of the next tile, where the block reads all that the cache holds side by side.
    Ahead rows_ahead(const Block & b, int64_t h, int64_t from, int64_t to) const {
        if (from >= to || b.heads != p_.n_kv_heads) return {};
        const size_t n = size_t(std::min(TILE, to - from)), part = size_t(h), heads = size_t(b.heads);
        const size_t k = n * p_.k.nb1 / heads, v = p_.shared ? 0 : n * p_.v.nb1 / heads;
        return {row(p_.k, b, 0, from) + part * k, k, row(p_.v, b, 0, from) + part * v, v};
    }

    static int32_t * pairs(float * p) { return reinterpret_cast<int32_t *>(p); }

    static void read_floats(const Rows & rows, const uint8_t * from, size_t step, int64_t n, int64_t width, float * to, int64_t stride, int64_t padded) {
        for (int64_t i = 0; i < n; i++, from += step, to += stride) {
            rows.to_float(from, to, width);
            std::fill(to + width, to + padded, 0.0f);
        }
    }

    // scores_[r][i..i+step] of the rows that were read last; what lies behind the tile's end is not used.
    void score(const Block & b, int64_t h, int64_t i, Ahead & ahead) {
        const int64_t first = h * b.rows, last = first + b.rows;
        if (s_.whole) {
            in_groups<WHOLE_DOTS>(first, last, [&](auto rows, int64_t r) {
                whole_dots<rows.value>(whole_q_, r, whole_k_, s_.n_blocks, p_.rows_k->minima, scores_ + r * TILE + i);
            });
        } else if (s_.key_pairs) {
            in_groups<PAIR_DOTS>(first, last, [&](auto rows, int64_t r) {
                const int64_t n_pairs = s_.width_k / 2;
                pair_dots<rows.value>(pairs(q_) + r * n_pairs, pairs(k_), n_pairs, scores_ + r * TILE + i, ahead);
            });
        } else {
            in_groups<DOTS>(first, last, [&](auto rows, int64_t r) {
                dots<rows.value>(q_ + r * s_.width_k, k_ + i * s_.stride_k, s_.width_k, s_.stride_k, scores_ + r * TILE + i);
            });
        }
    }

    // Scores of one query scaled, capped and masked, minus infinity behind them; the largest of all.
    float masked_scores(const Block & b, int64_t r, int64_t start, int64_t n) {
        float *     s     = scores_ + r * TILE;
        const float scale = p_.softcap != 0 ? p_.scale / p_.softcap : p_.scale;
        if (r == 0 || p_.mask_heads > 1 || token(b, r) != token(b, r - 1)) read_mask(mask(b, r, start), n);
        std::fill(s + n, s + padded(n), 0.0f);
        vf tops = all(NOTHING);
        for (int64_t i = 0; i < padded(n); i += LANES) {
            vf x = load(s + i) * scale;
            if (p_.softcap != 0) {
                for (int j = 0; j < LANES; j++) x[j] = p_.softcap * std::tanh(x[j]);
            }
            x += load(added_ + i);
            store(s + i, x);
            tops = x > tops ? x : tops;
        }
        float top = NOTHING;
        for (int j = 0; j < LANES; j++) top = std::max(top, tops[j]);
        return top;
    }

    // Scores of one query to weights, and what it has so far to the new largest score (arXiv 2112.05682).
    void weigh(const Block & b, int64_t r, int64_t start, int64_t n) {
        float *     s   = scores_ + r * TILE;
        const float top = std::max(b.largest[r], masked_scores(b, r, start, n));
        if (top == NOTHING) {
            std::fill(s, s + padded(n), 0.0f);  // as floats and as pairs
            return;
        }
        if (top > b.largest[r]) {
            const float keep = b.sum[r] == 0 ? 0.0f : std::exp(b.largest[r] - top);
            float *     out  = b.out + r * s_.width_v;
            for (int64_t c = 0; c < s_.width_v; c += LANES) store(out + c, load(out + c) * keep);
            b.sum[r] *= keep;
            b.largest[r] = top;
        }
        vf total = {};
        for (int64_t i = 0; i < padded(n); i += LANES) {
            const vf x = exp_negative(load(s + i) - top);
            store(s + i, x);
            total += x;
        }
        if (s_.value_pairs) store_pairs(s, pairs(s), padded(n));
        for (int j = 0; j < LANES; j++) b.sum[r] += total[j];
    }

    // What the mask adds to scores of n rows; minus infinity behind them.
    void read_mask(const uint16_t * mask, int64_t n) {
        std::fill(added_, added_ + TILE, NOTHING);
        if (mask) {
            halves_to_float(reinterpret_cast<const uint8_t *>(mask), added_, n);
        } else {
            std::fill(added_, added_ + n, 0.0f);
        }
    }

    // Rows of a tile whose scores are computed: whole vectors of pairs.
    static int64_t padded(int64_t n) { return up(n, 2 * LANES); }

    void add_values(const Block & b, int64_t h, int64_t n, Ahead & ahead) {
        if (s_.value_pairs) return add_value_pairs(b, h, n, ahead);
        in_groups<MIXED>(h * b.rows, (h + 1) * b.rows, [&](auto rows, int64_t r) {
            constexpr int M = columns(rows.value);
            const float * p = scores_ + r * TILE;
            float *       out = b.out + r * s_.width_v;
            int64_t       c = 0;
            for (; c + M * LANES <= s_.width_v; c += M * LANES) mix<rows.value, M>(p, v_ + c, s_.stride_v, n, out + c, s_.width_v);
            for (; c < s_.width_v; c += LANES) mix<rows.value, 1>(p, v_ + c, s_.stride_v, n, out + c, s_.width_v);
        });
    }

    void add_value_pairs(const Block & b, int64_t h, int64_t n, Ahead & ahead) {
        const int64_t n_pairs = (n + 1) / 2;
        in_groups<PAIR_MIXED>(h * b.rows, (h + 1) * b.rows, [&](auto rows, int64_t r) {
            constexpr int   M = pair_columns(rows.value);
            const int32_t * p = pairs(scores_ + r * TILE), *v = pairs(v_);
            float *         out = b.out + r * s_.width_v;
            int64_t         c = 0;
            for (; c + M * LANES <= s_.width_v; c += M * LANES) pair_mix<rows.value, M>(p, v + c, s_.stride_v, n_pairs, out + c, s_.width_v, ahead);
            for (; c < s_.width_v; c += LANES) pair_mix<rows.value, 1>(p, v + c, s_.stride_v, n_pairs, out + c, s_.width_v, ahead);
        });
    }
};

// Parts of one block, each over a stretch of the cache and `step` floats behind the one before, as one row of the output;
// and of `softmax`, where it is wanted.
void finish(const Problem & p, const Sizes & s, const Block & b, int64_t n_parts, size_t step, int64_t r, float * softmax) {
    const int64_t local = b.first + r % b.rows, token = local / s.group, head = (b.kv_head + r / b.rows) * s.group + local % s.group;
    float         top   = p.sinks ? p.sinks[head] : NOTHING;
    for (int64_t i = 0; i < n_parts; i++) top = std::max(top, b.largest[size_t(i) * step + size_t(r)]);
    const int64_t at_query = (b.seq * p.n_tokens + token) * p.n_heads + head;
    float *       out      = p.out + at_query * p.width_v;
    std::fill(out, out + p.width_v, 0.0f);
    if (softmax) softmax[2 * at_query] = softmax[2 * at_query + 1] = 0;
    if (top == NOTHING) return;
    float sum = p.sinks ? std::exp(p.sinks[head] - top) : 0.0f;
    for (int64_t i = 0; i < n_parts; i++) {
        const size_t at = size_t(i) * step;
        if (b.largest[at + size_t(r)] == NOTHING) continue;
        const float   weight = std::exp(b.largest[at + size_t(r)] - top);
        const float * from   = b.out + at + size_t(r * s.width_v);
        sum += weight * b.sum[at + size_t(r)];
        for (int64_t c = 0; c < p.width_v; c++) out[c] += weight * from[c];
    }
    for (int64_t c = 0; c < p.width_v; c++) out[c] /= sum;
    if (softmax) softmax[2 * at_query] = top, softmax[2 * at_query + 1] = 1 / sum;
}

}  // namespace

Scratch::~Scratch() { std::free(data_); }

float * Scratch::reserve(size_t n) {
    if (n > size_) {
        std::free(data_);
        size_ = 0;
        data_ = static_cast<float *>(std::aligned_alloc(64, size_t(up(int64_t(n * sizeof(float)), 64))));
        if (!data_) throw std::bad_alloc();
        size_ = n;
    }
    return data_;
}

void attention(const Problem & p, int n_threads, Scratch & scratch) {
    const Sizes   s(p);
    const int64_t rows = p.n_tokens * s.group, in_block = std::min(BLOCK, rows), per_head = (rows + BLOCK - 1) / BLOCK;
    const int64_t heads = std::min(BLOCK / in_block, p.n_kv_heads), per_seq = (p.n_kv_heads + heads - 1) / heads * per_head;
    const int64_t n_blocks = p.n_seq * per_seq;
    // Few blocks are shared out by stretches of the cache: four for each thread, so that nobody waits long.
    int64_t n_parts = n_blocks >= 4 * n_threads ? 1 : (4 * n_threads + n_blocks - 1) / n_blocks;
    n_parts         = std::max<int64_t>(1, std::min(n_parts, p.n_rows / CHUNK));
    const int64_t stretch = up((p.n_rows + n_parts - 1) / n_parts, TILE);

    const int64_t most     = heads * in_block;
    const size_t  part     = size_t(up(most * (s.width_v + 2), 16));
    const size_t  thread   = size_t(up(int64_t(s.floats()), 16));
    // With whole blocks a thread's part is used again; else all of them are kept until the end.
    const int64_t n_kept = n_parts > 1 ? n_blocks * n_parts : n_threads;
    const size_t  queries = p.mass ? size_t(p.n_seq * p.n_tokens * p.n_heads) : 0;
    float *       memory  = scratch.reserve(thread * size_t(n_threads) + part * size_t(n_kept) + 2 * queries);
    float *       kept    = memory + thread * size_t(n_threads);
    float *       softmax = p.mass ? kept + part * size_t(n_kept) : nullptr;

    auto block = [&](int64_t index, int64_t slot) {
        Block b;
        b.seq     = index / per_seq;
        b.kv_head = index % per_seq / per_head * heads;
        b.heads   = std::min(heads, p.n_kv_heads - b.kv_head);
        b.first   = index % per_head * BLOCK;
        b.rows    = std::min(in_block, rows - b.first);
        b.count   = b.heads * b.rows;
        b.out     = kept + part * size_t(slot);
        b.largest = b.out + most * s.width_v;
        b.sum     = b.largest + most;
        return b;
    };
#pragma omp parallel num_threads(n_threads)
    {
#ifdef _OPENMP
        const int me = omp_get_thread_num();
#else
        const int me = 0;
#endif
        Worker worker(p, s, memory + thread * size_t(me));
        if (n_parts == 1) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < n_blocks; i++) {
                const Block b = block(i, me);
                worker.run(b, 0, p.n_rows);
                for (int64_t r = 0; r < b.count; r++) finish(p, s, b, 1, part, r, softmax);
            }
        } else {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < n_blocks * n_parts; i++) {
                const int64_t from = i % n_parts * stretch;
                worker.run(block(i / n_parts, i), std::min(from, p.n_rows), std::min(from + stretch, p.n_rows));
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n_blocks; i++) {
                const Block b = block(i, i * n_parts);
                for (int64_t r = 0; r < b.count; r++) finish(p, s, b, n_parts, part, r, softmax);
            }
        }
        if (p.mass) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t from = 0; from < p.n_rows; from += CHUNK) {
                for (int64_t i = 0; i < n_blocks; i++) worker.add_mass(block(i, 0), softmax, from, std::min(from + CHUNK, p.n_rows));
            }
        }
    }
}

}  // namespace edgekv
