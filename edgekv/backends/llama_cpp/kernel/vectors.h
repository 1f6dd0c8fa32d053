// Vectors of the machine's width, by the compiler's vector extensions: one source for AVX-512, AVX2 and NEON.
//
// They are moved to and from memory by `load` and `store` alone: a vector type of lesser alignment would never stay in
// registers.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace edgekv {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float   vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint8_t u8x __attribute__((vector_size(16)));
typedef int8_t  s8x __attribute__((vector_size(16)));

inline vf   load(const float * p) { vf x; std::memcpy(&x, p, sizeof x); return x; }
inline vi   load(const int32_t * p) { vi x; std::memcpy(&x, p, sizeof x); return x; }
inline void store(float * p, vf x) { std::memcpy(p, &x, sizeof x); }
inline void store(int32_t * p, vi x) { std::memcpy(p, &x, sizeof x); }
inline vf   all(float x) { return x - vf{}; }
inline vi   all(int32_t x) { return x - vi{}; }
inline u8x  bytes(const uint8_t * p) { u8x x; std::memcpy(&x, p, sizeof x); return x; }

// table[index[i]], index below 16
inline u8x lookup(u8x table, u8x index) {
#if defined(__AVX2__)
    return u8x(_mm_shuffle_epi8(__m128i(table), __m128i(index)));
#elif defined(__aarch64__)
    return u8x(vqtbl1q_u8(uint8x16_t(table), uint8x16_t(index)));
#else
    u8x x;
    for (int i = 0; i < 16; i++) x[i] = table[index[i]];
    return x;
#endif
}

inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

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

// out[i] = the sum of a[i]'s lanes, i < 4.
inline void sums_of_four(const vf * a, float * out) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const auto half = [&](int i) { return _mm256_add_ps(_mm512_castps512_ps256(__m512(a[i])), _mm512_extractf32x8_ps(__m512(a[i]), 1)); };
#else
    const auto half = [&](int i) { return __m256(a[i]); };
#endif
    const __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(half(0), half(1)), _mm256_hadd_ps(half(2), half(3)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
#elif defined(__aarch64__)
    for (int i = 0; i < 4; i++) out[i] = vaddvq_f32(float32x4_t(a[i]));
#else
    for (int i = 0; i < 4; i++) {
        out[i] = 0;
        for (int j = 0; j < LANES; j++) out[i] += a[i][j];
    }
#endif
}

// LANES rows of 32 bytes as (8, LANES, 4): four bytes of each row side by side.
inline void interleave(const uint8_t (*rows)[32], uint8_t * out) {
#if defined(__aarch64__)
    for (int half = 0; half < 32; half += 16, out += 64) {
        uint32x4x4_t x;
        for (int i = 0; i < 4; i++) x.val[i] = vreinterpretq_u32_u8(vld1q_u8(rows[i] + half));
        vst4q_u32(reinterpret_cast<uint32_t *>(out), x);
    }
#elif defined(__AVX2__)
    for (int first = 0; first < LANES; first += 8) {
        __m256i a[8], b[8];
        for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(rows[first + i]));
        for (int i = 0; i < 8; i += 2) b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
        for (int i = 0; i < 8; i += 4) {
            for (int j = 0; j < 2; j++) {
                a[i + 2 * j]     = _mm256_unpacklo_epi64(b[i + j], b[i + j + 2]);
                a[i + 2 * j + 1] = _mm256_unpackhi_epi64(b[i + j], b[i + j + 2]);
            }
        }
        for (int i = 0; i < 4; i++) {
            auto at = [&](int step) { return reinterpret_cast<__m256i *>(out + step * LANES * 4 + first * 4); };
            _mm256_storeu_si256(at(i), _mm256_permute2x128_si256(a[i], a[i + 4], 0x20));
            _mm256_storeu_si256(at(i + 4), _mm256_permute2x128_si256(a[i], a[i + 4], 0x31));
        }
    }
#else
    for (int i = 0; i < LANES; i++) {
        for (int step = 0; step < 8; step++) std::memcpy(out + (step * LANES + i) * 4, rows[i] + step * 4, 4);
    }
#endif
}

// Whether products of any two bytes can be added up below, or only those of codes under 32.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool ANY_CODE = true;
#else
constexpr bool ANY_CODE = false;
#endif

// dot[i][lane] += q[i] . k[lane] over 32 values: k in 8 vectors of 4 bytes a lane, q[i] 32 bytes at q + i * q_stride.
// On x86 k is unsigned; on ARM it is signed, which is the same for codes under 128.
template <int N>
inline void add_dots(const uint8_t * k, const int8_t * q, int64_t q_stride, vi * dot) {
    const auto four = [&](int i, int step) { int32_t x; std::memcpy(&x, q + i * q_stride + 4 * step, 4); return x; };
#if defined(__ARM_FEATURE_DOTPROD)
    for (int step = 0; step < 8; step++) {
        const int8x16_t x = vreinterpretq_s8_u8(vld1q_u8(k + step * 16));
        for (int i = 0; i < N; i++) dot[i] = vi(vdotq_s32(int32x4_t(dot[i]), x, vreinterpretq_s8_s32(vdupq_n_s32(four(i, step)))));
    }
#elif defined(__aarch64__)
    int16x8_t low[N] = {}, high[N] = {};  // two rows each, one product a step
    for (int step = 0; step < 8; step++) {
        const int8x16_t x = vreinterpretq_s8_u8(vld1q_u8(k + step * 16));
        for (int i = 0; i < N; i++) {
            const int8x16_t y = vreinterpretq_s8_s32(vdupq_n_s32(four(i, step)));
            low[i]            = vmlal_s8(low[i], vget_low_s8(x), vget_low_s8(y));
            high[i]           = vmlal_high_s8(high[i], x, y);
        }
    }
    for (int i = 0; i < N; i++) dot[i] += vi(vpaddq_s32(vpaddlq_s16(low[i]), vpaddlq_s16(high[i])));
#elif defined(__AVX512VNNI__)
    for (int step = 0; step < 8; step++) {
        const __m512i x = _mm512_loadu_si512(k + step * 64);
        for (int i = 0; i < N; i++) dot[i] = vi(_mm512_dpbusd_epi32(__m512i(dot[i]), x, _mm512_set1_epi32(four(i, step))));
    }
#elif defined(__AVXVNNI__)
    for (int step = 0; step < 8; step++) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(k + step * 32));
        for (int i = 0; i < N; i++) dot[i] = vi(_mm256_dpbusd_avx_epi32(__m256i(dot[i]), x, _mm256_set1_epi32(four(i, step))));
    }
#elif defined(__AVX2__) && !defined(__AVX512F__)
    for (int half = 0; half < 8; half += 4) {  // eight products of codes under 32 fit in 16 bits
        __m256i sum[N];
        for (int step = half; step < half + 4; step++) {
            const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(k + step * 32));
            for (int i = 0; i < N; i++) {
                const __m256i pairs = _mm256_maddubs_epi16(x, _mm256_set1_epi32(four(i, step)));
                sum[i]              = step == half ? pairs : _mm256_add_epi16(sum[i], pairs);
            }
        }
        for (int i = 0; i < N; i++) dot[i] += vi(_mm256_madd_epi16(sum[i], _mm256_set1_epi16(1)));
    }
#else
    for (int step = 0; step < 8; step++) {
        for (int i = 0; i < N; i++) {
            for (int j = 0; j < 4 * LANES; j++) dot[i][j / 4] += int(k[step * 4 * LANES + j]) * q[i * q_stride + 4 * step + j % 4];
        }
    }
    (void) four;
#endif
}

// ---- pairs of bfloat16 in 32 bits, the first in the lower half ----

#if defined(__AVX512BF16__)
// Lane i: values 2 i and 2 i + 1 of both, one behind the other.
inline vi neighbours(vf first, vf second) { return vi(_mm512_cvtne2ps_pbh(__m512(second), __m512(first))); }
#endif

// n floats as n / 2 pairs, which may lie in the same place.
inline void store_pairs(const float * from, int32_t * to, int64_t n) {
#if defined(__AVX512BF16__)
    for (int64_t i = 0; i < n; i += 2 * LANES) {
        store(to + i / 2, neighbours(load(from + i), load(from + i + LANES)));
    }
#else
    (void) from, (void) to, (void) n;  // no type has pairs here
#endif
}

// sum plus both products of a and b in each lane.
inline vf add_products(vf sum, vi a, vi b) {
#if defined(__AVX512BF16__)
    return vf(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
#else
    return sum + vf(a << 16) * vf(b << 16) + vf(a & ~0xffff) * vf(b & ~0xffff);
#endif
}

#if defined(__AVX512BF16__)
// Lane i: (low[i], high[i]).
inline vi pairs(vf low, vf high) {
    alignas(64) static constexpr uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return vi(_mm512_permutexvar_epi16(_mm512_load_si512(ORDER), __m512i(neighbours(low, high))));
}

// x[i][j] to x[j][i].
inline void transpose(vi (&x)[16]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i]     = _mm512_unpacklo_epi32(__m512i(x[i]), __m512i(x[i + 1]));
        a[i + 1] = _mm512_unpackhi_epi32(__m512i(x[i]), __m512i(x[i + 1]));
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j]     = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    }
    for (int j = 0; j < 4; j++) {  // b[4 i + j]: rows 4 i to 4 i + 3, columns j, j + 4, j + 8 and j + 12
        const __m512i low = _mm512_shuffle_i32x4(b[j], b[j + 4], 0x88), high = _mm512_shuffle_i32x4(b[j], b[j + 4], 0xdd);
        const __m512i low_2 = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0x88), high_2 = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0xdd);
        x[j]      = vi(_mm512_shuffle_i32x4(low, low_2, 0x88));
        x[j + 8]  = vi(_mm512_shuffle_i32x4(low, low_2, 0xdd));
        x[j + 4]  = vi(_mm512_shuffle_i32x4(high, high_2, 0x88));
        x[j + 12] = vi(_mm512_shuffle_i32x4(high, high_2, 0xdd));
    }
}
#endif

}  // namespace edgekv
