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
#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace edgekv {
namespace {

// Vectors of the machine's width, by the compiler's vector extensions: one source for AVX-512, AVX2 and NEON. They are
// moved to and from memory by `load` and `store` alone: a vector type of lesser alignment would never stay in registers.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float   vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef float   f16x __attribute__((vector_size(64)));      // 16 values
typedef int32_t i16x __attribute__((vector_size(64)));
typedef uint8_t u8x __attribute__((vector_size(16)));
typedef int8_t  s8x __attribute__((vector_size(16)));

constexpr int64_t TILE    = 64;  // cached rows at a time
constexpr int64_t BLOCK   = 72;  // rows of queries at a time: heads times tokens, a multiple of Q
constexpr int     Q       = 3;   // rows of queries in registers
constexpr int     R       = 4;   // cached rows in registers
constexpr int64_t CHUNK   = 512; // least cached rows that one thread takes
constexpr float   NOTHING = -std::numeric_limits<float>::infinity();

inline vf    load(const float * p) { vf x; std::memcpy(&x, p, sizeof x); return x; }
inline void  store(float * p, vf x) { std::memcpy(p, &x, sizeof x); }
inline vf    all(float x) { return x - vf{}; }
inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#elif defined(__aarch64__)
    __fp16 x;
    std::memcpy(&x, &h, sizeof x);
    return x;
#else
    const uint32_t sign = uint32_t(h & 0x8000) << 16, mantissa = h & 0x3ff;
    const int      exponent = (h >> 10) & 31;
    float          x;
    if (exponent == 0) {
        x = std::ldexp(float(mantissa), -24);
    } else if (exponent == 31) {
        x = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
    } else {
        x = std::ldexp(float(mantissa | 0x400), exponent - 25);
    }
    return sign ? -x : x;
#endif
}

inline float half_at(const uint8_t * p) {
    uint16_t h;
    std::memcpy(&h, p, sizeof h);
    return half_to_float(h);
}

// ---- rows to float32: layouts of ggml/src/ggml-common.h, values of ggml/src/ggml-quants.c ----

inline u8x bytes(const uint8_t * p) { u8x x; std::memcpy(&x, p, sizeof x); return x; }

template <class V> inline void put(float * out, V x) { std::memcpy(out, &x, sizeof x); }

template <class B> inline f16x widened(B x) {
    return __builtin_convertvector(__builtin_convertvector(x, i16x), f16x);
}

void row_f16(const uint8_t * p, float * out, int64_t n) {
    int64_t i = 0;
#if defined(__F16C__) && defined(__AVX__)
    for (; i + 8 <= n; i += 8) {
        __m128i h;
        std::memcpy(&h, p + 2 * i, sizeof h);
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(h));
    }
#elif defined(__aarch64__)
    for (; i + 4 <= n; i += 4) {
        float16x4_t h;
        std::memcpy(&h, p + 2 * i, sizeof h);
        vst1q_f32(out + i, vcvt_f32_f16(h));
    }
#endif
    for (; i < n; i++) out[i] = half_at(p + 2 * i);
}

void row_bf16(const uint8_t * p, float * out, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint16_t h;
        std::memcpy(&h, p + 2 * i, sizeof h);
        const uint32_t bits = uint32_t(h) << 16;
        std::memcpy(out + i, &bits, sizeof bits);
    }
}

void row_q8_0(const uint8_t * p, float * out, int64_t n) {
    for (; n > 0; n -= 32, p += 34, out += 32) {
        const float d = half_at(p);
        s8x         low, high;
        std::memcpy(&low, p + 2, 16);
        std::memcpy(&high, p + 18, 16);
        put(out, widened(low) * d);
        put(out + 16, widened(high) * d);
    }
}

void row_q4_0(const uint8_t * p, float * out, int64_t n) {
    for (; n > 0; n -= 32, p += 18, out += 32) {
        const float d = half_at(p);
        const u8x   q = bytes(p + 2);
        put(out, (widened(q & 15) - 8.0f) * d);
        put(out + 16, (widened(q >> 4) - 8.0f) * d);
    }
}

void row_q4_1(const uint8_t * p, float * out, int64_t n) {
    for (; n > 0; n -= 32, p += 20, out += 32) {
        const float d = half_at(p), m = half_at(p + 2);
        const u8x   q = bytes(p + 4);
        put(out, widened(q & 15) * d + m);
        put(out + 16, widened(q >> 4) * d + m);
    }
}

// The fifth bits of 16 values, each as 16 or 0.
inline u8x fifth_bits(uint32_t bits) {
    const u8x places = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8_t a = uint8_t(bits), b = uint8_t(bits >> 8);
    const u8x     both = {a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b};
    return u8x((both & places) != 0) & 16;
}

void row_q5_0(const uint8_t * p, float * out, int64_t n) {
    for (; n > 0; n -= 32, p += 22, out += 32) {
        const float d = half_at(p);
        uint32_t    high;
        std::memcpy(&high, p + 2, 4);
        const u8x q = bytes(p + 6);
        put(out, (widened((q & 15) | fifth_bits(high)) - 16.0f) * d);
        put(out + 16, (widened((q >> 4) | fifth_bits(high >> 16)) - 16.0f) * d);
    }
}

void row_q5_1(const uint8_t * p, float * out, int64_t n) {
    for (; n > 0; n -= 32, p += 24, out += 32) {
        const float d = half_at(p), m = half_at(p + 2);
        uint32_t    high;
        std::memcpy(&high, p + 4, 4);
        const u8x q = bytes(p + 8);
        put(out, widened((q & 15) | fifth_bits(high)) * d + m);
        put(out + 16, widened((q >> 4) | fifth_bits(high >> 16)) * d + m);
    }
}

void row_iq4_nl(const uint8_t * p, float * out, int64_t n) {
    const s8x levels = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    for (; n > 0; n -= 32, p += 18, out += 32) {
        const float d = half_at(p);
        const u8x   q = bytes(p + 2);
        put(out, widened(__builtin_shuffle(levels, s8x(q & 15))) * d);
        put(out + 16, widened(__builtin_shuffle(levels, s8x(q >> 4))) * d);
    }
}

void row_f32(const uint8_t * p, float * out, int64_t n) { std::memcpy(out, p, size_t(n) * sizeof(float)); }

using RowFunction = void (*)(const uint8_t *, float *, int64_t);

RowFunction row_function(Type type) {
    switch (type) {
        case Type::f32: return row_f32;
        case Type::f16: return row_f16;
        case Type::bf16: return row_bf16;
        case Type::q8_0: return row_q8_0;
        case Type::q5_1: return row_q5_1;
        case Type::q5_0: return row_q5_0;
        case Type::q4_1: return row_q4_1;
        case Type::q4_0: return row_q4_0;
        case Type::iq4_nl: return row_iq4_nl;
    }
    return nullptr;
}

// ---- arithmetic ----

// exp(x) for x <= 0, relative error below 2e-7; 0 below the least normal number. Cody-Waite reduction and a polynomial
// of degree 6 (Cephes, expf).
inline vf exp_negative(vf x) {
    const vf shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const vi below = x < all(-87.0f);
    x              = below ? all(-87.0f) : x;
    const vf n     = (x * all(1.44269504f) + shift) - shift;
    const vf r     = (x - n * all(0.693359375f)) + n * all(2.12194440e-4f);
    vf       y     = all(1.9875691500e-4f);
    y              = y * r + all(1.3981999507e-3f);
    y              = y * r + all(8.3334519073e-3f);
    y              = y * r + all(4.1665795894e-2f);
    y              = y * r + all(1.6666665459e-1f);
    y              = y * r + all(5.0000001201e-1f);
    y              = y * r * r + r + all(1.0f);
    const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    y *= (vf) power;
    return below ? vf{} : y;
}

// Sums of the lanes of four vectors.
inline void sums(const vf * a, float * out) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(__m256(a[0]), __m256(a[1])), _mm256_hadd_ps(__m256(a[2]), __m256(a[3])));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
#elif defined(__aarch64__)
    for (int i = 0; i < 4; i++) out[i] = vaddvq_f32(float32x4_t(a[i]));
#elif defined(__AVX512F__)
    for (int i = 0; i < 4; i++) out[i] = _mm512_reduce_add_ps(__m512(a[i]));
#else
    for (int i = 0; i < 4; i++) {
        out[i] = 0;
        for (int j = 0; j < LANES; j++) out[i] += a[i][j];
    }
#endif
}

// scores[N][R] = q[N] . k[R], the widths padded with zeros.
template <int N>
inline void dots(const float * q, const float * k, int64_t stride, float * scores) {
    vf sum[N][R] = {};
    for (int64_t d = 0; d < stride; d += LANES) {
        vf row[R];
        for (int r = 0; r < R; r++) row[r] = load(k + r * stride + d);
        for (int i = 0; i < N; i++) {
            const vf x = load(q + i * stride + d);
            for (int r = 0; r < R; r++) sum[i][r] += x * row[r];
        }
    }
    for (int i = 0; i < N; i++) sums(sum[i], scores + i * TILE);
}

// out[N][C vectors] += p[N][n_rows] v[n_rows][C vectors]
template <int N, int C>
inline void mix(const float * p, const float * v, int64_t v_stride, int64_t n_rows, float * out, int64_t o_stride) {
    vf sum[N][C];
    for (int i = 0; i < N; i++) {
        for (int c = 0; c < C; c++) sum[i][c] = load(out + i * o_stride + c * LANES);
    }
    for (int64_t r = 0; r < n_rows; r++) {
        vf row[C];
        for (int c = 0; c < C; c++) row[c] = load(v + r * v_stride + c * LANES);
        for (int i = 0; i < N; i++) {
            const vf x = all(p[i * TILE + r]);
            for (int c = 0; c < C; c++) sum[i][c] += x * row[c];
        }
    }
    for (int i = 0; i < N; i++) {
        for (int c = 0; c < C; c++) store(out + i * o_stride + c * LANES, sum[i][c]);
    }
}

template <int N>
void mix_row_block(const float * p, const float * v, int64_t v_stride, int64_t n_rows, float * out, int64_t width) {
    int64_t c = 0;
    for (; c + 4 * LANES <= width; c += 4 * LANES) mix<N, 4>(p, v + c, v_stride, n_rows, out + c, width);
    for (; c < width; c += LANES) mix<N, 1>(p, v + c, v_stride, n_rows, out + c, width);
}

// ---- one block of queries against a stretch of the cache ----

struct Sizes {
    int64_t group;             // query heads that share a KV head
    int64_t width_k, width_v;  // padded to whole vectors
    int64_t tile_v;            // stride of the rows that values are read from
    size_t  floats;            // scratch of a thread

    explicit Sizes(const Problem & p) {
        group   = p.n_heads / p.n_kv_heads;
        width_k = up(p.width_k, LANES);
        width_v = up(p.width_v, LANES);
        tile_v  = p.shared ? width_k : width_v;
        floats  = size_t(BLOCK * width_k + BLOCK * TILE + TILE * width_k + (p.shared ? 0 : TILE * width_v));
    }
};

// A block of queries: rows (token, head) of one sequence and one KV head, and what they have seen so far.
struct Block {
    int64_t seq, kv_head, first, count;  // rows first..first+count of T * group
    float * out;                         // (count, width_v)
    float * largest;                     // (count) of the scores
    float * sum;                         // (count) of exp(score - largest)
};

class Worker {
public:
    Worker(const Problem & p, const Sizes & s, float * scratch)
        : p_(p), s_(s), q_(scratch), scores_(q_ + BLOCK * s.width_k), k_(scores_ + BLOCK * TILE),
          v_(p.shared ? k_ : k_ + TILE * s.width_k), k_row_(row_function(p.type_k)), v_row_(row_function(p.type_v)) {}

    void run(const Block & b, int64_t from, int64_t to) {
        read_queries(b);
        std::fill(b.out, b.out + b.count * s_.width_v, 0.0f);
        std::fill(b.largest, b.largest + b.count, NOTHING);
        std::fill(b.sum, b.sum + b.count, 0.0f);
        for (int64_t start = from; start < to; start += TILE) {
            const int64_t n = std::min(TILE, to - start);
            if (!seen(b, start, n)) continue;
            read_rows(b, start, n);
            score(b, start, n, std::min(TILE, to - start - n));
            for (int64_t r = 0; r < b.count; r++) weigh(b, r, start, n);
            add_values(b, n);
        }
    }

private:
    const Problem &   p_;
    const Sizes &     s_;
    float *           q_;
    float *           scores_;
    float *           k_;
    float *           v_;
    const RowFunction k_row_, v_row_;

    int64_t token(const Block & b, int64_t r) const { return (b.first + r) / s_.group; }
    int64_t head(const Block & b, int64_t r) const { return b.kv_head * s_.group + (b.first + r) % s_.group; }

    const uint16_t * mask(const Block & b, int64_t r, int64_t start) const {
        const View & m = p_.mask;
        if (!m.data) return nullptr;
        const char * at = m.data + size_t(token(b, r)) * m.nb1 + size_t(head(b, r) % p_.mask_heads) * m.nb2 +
                          size_t(b.seq % p_.mask_seq) * m.nb3;
        return reinterpret_cast<const uint16_t *>(at) + start;
    }

    const uint8_t * row(const View & x, const Block & b, int64_t i) const {
        return reinterpret_cast<const uint8_t *>(x.data + size_t(i) * x.nb1 + size_t(b.kv_head) * x.nb2 +
                                                 size_t(b.seq) * x.nb3);
    }

    void read_queries(const Block & b) {
        for (int64_t r = 0; r < b.count; r++) {
            const char * at = p_.q.data + size_t(token(b, r)) * p_.q.nb1 + size_t(head(b, r)) * p_.q.nb2 + size_t(b.seq) * p_.q.nb3;
            float *      to = q_ + r * s_.width_k;
            std::memcpy(to, at, size_t(p_.width_k) * sizeof(float));
            std::fill(to + p_.width_k, to + s_.width_k, 0.0f);
        }
    }

    // Whether any query of the block sees any of these rows. Masks are of tokens, or of tokens and heads.
    bool seen(const Block & b, int64_t start, int64_t n) const {
        if (!p_.mask.data) return true;
        const int64_t step = p_.mask_heads == 1 ? s_.group : 1;
        for (int64_t r = 0; r < b.count; r += step) {
            const uint16_t * m = mask(b, r, start);
            for (int64_t i = 0; i < n; i++) {
                if (m[i] != 0xfc00) return true;  // minus infinity
            }
        }
        if (step > 1 && (b.first % step) != 0) {  // the block began within a token: its last one was not looked at
            const uint16_t * m = mask(b, b.count - 1, start);
            for (int64_t i = 0; i < n; i++) {
                if (m[i] != 0xfc00) return true;
            }
        }
        return false;
    }

    void read_rows(const Block & b, int64_t start, int64_t n) {
        for (int64_t i = 0; i < n; i++) {
            float * to = k_ + i * s_.width_k;
            k_row_(row(p_.k, b, start + i), to, p_.width_k);
            std::fill(to + p_.width_k, to + s_.width_k, 0.0f);
            if (!p_.shared) {
                to = v_ + i * s_.width_v;
                v_row_(row(p_.v, b, start + i), to, p_.width_v);
                std::fill(to + p_.width_v, to + s_.width_v, 0.0f);
            }
        }
        // Rows behind the end are multiplied too: they must be numbers.
        std::fill(k_ + n * s_.width_k, k_ + up(n, R) * s_.width_k, 0.0f);
    }

    // Rows that come next are fetched while these are multiplied: read 64 at a time, the hardware does not foresee them.
    void prefetch(const Block & b, int64_t i) const {
        const uint8_t * k = row(p_.k, b, i);
        for (size_t at = 0; at < row_nbytes(p_.type_k, p_.width_k); at += 64) __builtin_prefetch(k + at);
        if (p_.shared) return;
        const uint8_t * v = row(p_.v, b, i);
        for (size_t at = 0; at < row_nbytes(p_.type_v, p_.width_v); at += 64) __builtin_prefetch(v + at);
    }

    void score(const Block & b, int64_t start, int64_t n, int64_t n_next) {
        for (int64_t i = 0; i < n; i += R) {
            for (int64_t next = i; next < std::min(i + R, n_next); next++) prefetch(b, start + n + next);
            const float * k = k_ + i * s_.width_k;
            int64_t       r = 0;
            for (; r + Q <= b.count; r += Q) dots<Q>(q_ + r * s_.width_k, k, s_.width_k, scores_ + r * TILE + i);
            for (; r < b.count; r++) dots<1>(q_ + r * s_.width_k, k, s_.width_k, scores_ + r * TILE + i);
        }
    }

    // Scores of one query to weights, and what it has so far to the new largest score (arXiv 2112.05682).
    void weigh(const Block & b, int64_t r, int64_t start, int64_t n) {
        float *          s     = scores_ + r * TILE;
        const uint16_t * m     = mask(b, r, start);
        const float      scale = p_.softcap != 0 ? p_.scale / p_.softcap : p_.scale;
        float            added[TILE] = {};
        if (m) row_f16(reinterpret_cast<const uint8_t *>(m), added, n);
        std::fill(added + n, added + TILE, NOTHING);
        std::fill(s + n, s + up(n, LANES), 0.0f);
        vf tops = all(NOTHING);
        for (int64_t i = 0; i < n; i += LANES) {
            vf x = load(s + i) * scale;
            if (p_.softcap != 0) {
                for (int j = 0; j < LANES; j++) x[j] = p_.softcap * std::tanh(x[j]);
            }
            x += load(added + i);  // minus infinity behind the end
            store(s + i, x);
            tops = x > tops ? x : tops;
        }
        float top = NOTHING;
        for (int j = 0; j < LANES; j++) top = std::max(top, tops[j]);
        top = std::max(top, b.largest[r]);
        if (top == NOTHING) {
            std::fill(s, s + n, 0.0f);
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
        for (int64_t i = 0; i < n; i += LANES) {
            const vf x = exp_negative(load(s + i) - top);
            store(s + i, x);
            total += x;
        }
        for (int j = 0; j < LANES; j++) b.sum[r] += total[j];
    }

    void add_values(const Block & b, int64_t n) {
        int64_t r = 0;
        for (; r + Q <= b.count; r += Q) mix_row_block<Q>(scores_ + r * TILE, v_, s_.tile_v, n, b.out + r * s_.width_v, s_.width_v);
        for (; r < b.count; r++) mix_row_block<1>(scores_ + r * TILE, v_, s_.tile_v, n, b.out + r * s_.width_v, s_.width_v);
    }
};

// Parts of one block, each over a stretch of the cache and `step` floats behind the one before, as one row of the output.
void finish(const Problem & p, const Sizes & s, const Block & b, int64_t n_parts, size_t step, int64_t r) {
    const int64_t token = (b.first + r) / s.group, head = b.kv_head * s.group + (b.first + r) % s.group;
    float         top   = p.sinks ? p.sinks[head] : NOTHING;
    for (int64_t i = 0; i < n_parts; i++) top = std::max(top, b.largest[size_t(i) * step + size_t(r)]);
    float * out = p.out + ((b.seq * p.n_tokens + token) * p.n_heads + head) * p.width_v;
    std::fill(out, out + p.width_v, 0.0f);
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

bool supported(Type type) { return row_function(type) != nullptr; }

size_t row_nbytes(Type type, int64_t n) {
    switch (type) {
        case Type::f32: return size_t(n) * 4;
        case Type::f16:
        case Type::bf16: return size_t(n) * 2;
        case Type::q8_0: return size_t(n) / 32 * 34;
        case Type::q5_1: return size_t(n) / 32 * 24;
        case Type::q5_0: return size_t(n) / 32 * 22;
        case Type::q4_1: return size_t(n) / 32 * 20;
        case Type::q4_0:
        case Type::iq4_nl: return size_t(n) / 32 * 18;
    }
    return 0;
}

void to_float(Type type, const void * row, float * out, int64_t n) {
    row_function(type)(static_cast<const uint8_t *>(row), out, n);
}

void attention(const Problem & p, int n_threads, Scratch & scratch) {
    const Sizes   s(p);
    const int64_t rows = p.n_tokens * s.group, per_head = (rows + BLOCK - 1) / BLOCK;
    const int64_t n_blocks = p.n_seq * p.n_kv_heads * per_head;
    // Few blocks are shared out by stretches of the cache: four for each thread, so that nobody waits long.
    int64_t n_parts = n_blocks >= 4 * n_threads ? 1 : (4 * n_threads + n_blocks - 1) / n_blocks;
    n_parts         = std::max<int64_t>(1, std::min(n_parts, p.n_rows / CHUNK));
    const int64_t stretch = up((p.n_rows + n_parts - 1) / n_parts, TILE);

    const int64_t in_block = std::min(BLOCK, rows);
    const size_t  part     = size_t(up(in_block * (s.width_v + 2), 16));
    const size_t  thread   = size_t(up(int64_t(s.floats), 16));
    // With whole blocks a thread's part is used again; else all of them are kept until the end.
    const int64_t n_kept = n_parts > 1 ? n_blocks * n_parts : n_threads;
    float *       memory = scratch.reserve(thread * size_t(n_threads) + part * size_t(n_kept));
    float *       kept   = memory + thread * size_t(n_threads);

    auto block = [&](int64_t index, int64_t slot) {
        Block b;
        b.seq     = index / (p.n_kv_heads * per_head);
        b.kv_head = index / per_head % p.n_kv_heads;
        b.first   = index % per_head * BLOCK;
        b.count   = std::min(BLOCK, rows - b.first);
        b.out     = kept + part * size_t(slot);
        b.largest = b.out + in_block * s.width_v;
        b.sum     = b.largest + in_block;
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
                for (int64_t r = 0; r < b.count; r++) finish(p, s, b, 1, part, r);
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
                for (int64_t r = 0; r < b.count; r++) finish(p, s, b, n_parts, part, r);
            }
        }
    }
}

}  // namespace edgekv
