#include "rows.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "vectors.h"

namespace edgekv {
namespace {

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

inline uint32_t word_at(const uint8_t * p) {
    uint32_t x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// ---- blocks of quantized formats: 32 codes as signed bytes, value = d * (code - OFFSET) + m ----

struct Codes {
    s8x   low, high;  // values 0 to 15 and 16 to 31
    float d, m;
};

struct Q8_0 {
    static constexpr size_t NBYTES = 34;
    static constexpr int    OFFSET = 0;
    static constexpr bool   MINIMA = false, SMALL = false;
    static Codes read(const uint8_t * p) { return {s8x(bytes(p + 2)), s8x(bytes(p + 18)), half_at(p), 0}; }
};

struct Q4_0 {
    static constexpr size_t NBYTES = 18;
    static constexpr int    OFFSET = 8;
    static constexpr bool   MINIMA = false, SMALL = true;
    static Codes read(const uint8_t * p) {
        const u8x q = bytes(p + 2);
        return {s8x(q & 15), s8x(q >> 4), half_at(p), 0};
    }
};

struct Q4_1 {
    static constexpr size_t NBYTES = 20;
    static constexpr int    OFFSET = 0;
    static constexpr bool   MINIMA = true, SMALL = true;
    static Codes read(const uint8_t * p) {
        const u8x q = bytes(p + 4);
        return {s8x(q & 15), s8x(q >> 4), half_at(p), half_at(p + 2)};
    }
};

// The fifth bits of the first or last 16 of 32 values, each as 16 or 0.
template <int HALF>
inline u8x fifth_bits(uint32_t bits) {
    typedef uint32_t u4x __attribute__((vector_size(16)));
    constexpr uint8_t a = 2 * HALF, b = a + 1;
    const u8x         places = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const u8x         spread = lookup(u8x(u4x{bits, bits, bits, bits}), u8x{a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b});
    return u8x((spread & places) == places) & 16;
}

struct Q5_0 {
    static constexpr size_t NBYTES = 22;
    static constexpr int    OFFSET = 16;
    static constexpr bool   MINIMA = false, SMALL = true;
    static Codes read(const uint8_t * p) {
        const uint32_t high = word_at(p + 2);
        const u8x      q    = bytes(p + 6);
        return {s8x((q & 15) | fifth_bits<0>(high)), s8x((q >> 4) | fifth_bits<1>(high)), half_at(p), 0};
    }
};

struct Q5_1 {
    static constexpr size_t NBYTES = 24;
    static constexpr int    OFFSET = 0;
    static constexpr bool   MINIMA = true, SMALL = true;
    static Codes read(const uint8_t * p) {
        const uint32_t high = word_at(p + 4);
        const u8x      q    = bytes(p + 8);
        return {s8x((q & 15) | fifth_bits<0>(high)), s8x((q >> 4) | fifth_bits<1>(high)), half_at(p), half_at(p + 2)};
    }
};

struct IQ4_NL {
    static constexpr size_t NBYTES = 18;
    static constexpr int    OFFSET = 0;
    static constexpr bool   MINIMA = false, SMALL = false;
    static Codes read(const uint8_t * p) {
        const s8x levels = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
        const u8x q      = bytes(p + 2);
        return {s8x(lookup(u8x(levels), q & 15)), s8x(lookup(u8x(levels), q >> 4)), half_at(p), 0};
    }
};

// ---- rows as float32 ----

#if defined(__AVX512F__)
// x * d + m
inline vf scaled(s8x x, float d, float m) { return vf(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(__m128i(x)))) * d + m; }
#endif

// out[16] = x * d + m
inline void put(float * out, s8x x, float d, float m) {
#if defined(__AVX512F__)
    store(out, scaled(x, d, m));
#elif defined(__AVX2__)
    const __m128i v = __m128i(x);
    store(out, vf(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v))) * d + m);
    store(out + 8, vf(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(v, v)))) * d + m);
#elif defined(__aarch64__)
    const int16x8_t low = vmovl_s8(vget_low_s8(int8x16_t(x))), high = vmovl_high_s8(int8x16_t(x));
    store(out, vf(vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)))) * d + m);
    store(out + 4, vf(vcvtq_f32_s32(vmovl_high_s16(low))) * d + m);
    store(out + 8, vf(vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)))) * d + m);
    store(out + 12, vf(vcvtq_f32_s32(vmovl_high_s16(high))) * d + m);
#else
    for (int i = 0; i < 16; i++) out[i] = float(x[i]) * d + m;
#endif
}

template <class Format>
void floats(const uint8_t * p, float * out, int64_t n) {
    for (; n > 0; n -= QK, p += Format::NBYTES, out += QK) {
        const Codes c = Format::read(p);
        const float m = c.m - float(Format::OFFSET) * c.d;
        put(out, c.low, c.d, m);
        put(out + 16, c.high, c.d, m);
    }
}

void floats_f32(const uint8_t * p, float * out, int64_t n) { std::memcpy(out, p, size_t(n) * sizeof(float)); }

void floats_bf16(const uint8_t * p, float * out, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint16_t h;
        std::memcpy(&h, p + 2 * i, sizeof h);
        const uint32_t bits = uint32_t(h) << 16;
        std::memcpy(out + i, &bits, sizeof bits);
    }
}

// ---- rows as whole numbers ----

// x86 multiplies unsigned by signed bytes: signed codes are moved up by 128 there.
#if defined(__aarch64__)
constexpr uint8_t SIGN = 0;
#else
constexpr uint8_t SIGN = 128;
#endif

// In one piece where `interleave` loads them so: a load waits until two stores that it spans are in the cache.
inline void store_codes(uint8_t * to, u8x low, u8x high) {
#if defined(__AVX2__)
    _mm256_store_si256(reinterpret_cast<__m256i *>(to), _mm256_set_m128i(__m128i(high), __m128i(low)));
#else
    const u8x both[2] = {low, high};
    std::memcpy(to, both, sizeof both);
#endif
}

template <class Format>
void codes(const uint8_t * rows, size_t stride, int count, uint8_t * to, float * d, float * m, int64_t n) {
    constexpr uint8_t sign = Format::SMALL ? 0 : SIGN;
    alignas(32) uint8_t block[LANES][QK] = {};
    for (; n > 0; n -= QK, rows += Format::NBYTES, to += QK * LANES, d += LANES, m += LANES) {
        for (int i = 0; i < LANES && i < count; i++) {
            const Codes c    = Format::read(rows + size_t(i) * stride);
            store_codes(block[i], u8x(c.low) ^ sign, u8x(c.high) ^ sign);
            d[i] = c.d;
            if (Format::MINIMA) m[i] = c.m;
        }
        interleave(block, to);
    }
}

// ---- rows as pairs of bfloat16, on machines that multiply them ----

#if defined(__AVX512BF16__)
struct F16 {
    static vf read(const uint8_t * p) {
        __m256i x;
        std::memcpy(&x, p, sizeof x);
        return vf(_mm512_cvtph_ps(x));
    }
    static vi neighbours(const uint8_t * p) { return edgekv::neighbours(read(p), read(p + 2 * LANES)); }
};

struct BF16 {
    static vf read(const uint8_t * p) {
        __m256i x;
        std::memcpy(&x, p, sizeof x);
        return vf(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
    }
    static vi neighbours(const uint8_t * p) {
        vi x;
        std::memcpy(&x, p, sizeof x);
        return x;
    }
};

template <class Format>
void key_pairs(const uint8_t * rows, size_t stride, int count, int32_t * out, int64_t n) {
    for (; n > 0; n -= 2 * LANES, rows += 4 * LANES, out += LANES * LANES) {
        vi x[LANES];
        for (int i = 0; i < LANES; i++) x[i] = Format::neighbours(rows + size_t(i < count ? i : 0) * stride);
        transpose(x);
        for (int i = 0; i < LANES; i++) store(out + i * LANES, x[i]);
    }
}

template <class Format>
void value_pairs(const uint8_t * a, const uint8_t * b, int32_t * out, int64_t n) {
    for (; n > 0; n -= LANES, a += 2 * LANES, b += 2 * LANES, out += LANES) {
        store(out, pairs(Format::read(a), Format::read(b)));
    }
}

template <class Format>
void quantized_pairs(const uint8_t * a, const uint8_t * b, int32_t * out, int64_t n) {
    for (; n > 0; n -= QK, a += Format::NBYTES, b += Format::NBYTES, out += QK) {
        const Codes x = Format::read(a), y = Format::read(b);
        const float least_x = x.m - float(Format::OFFSET) * x.d, least_y = y.m - float(Format::OFFSET) * y.d;
        store(out, pairs(scaled(x.low, x.d, least_x), scaled(y.low, y.d, least_y)));
        store(out + LANES, pairs(scaled(x.high, x.d, least_x), scaled(y.high, y.d, least_y)));
    }
}
#else
struct F16 {};
struct BF16 {};
template <class Format> constexpr ToKeyPairs   key_pairs       = nullptr;
template <class Format> constexpr ToValuePairs value_pairs     = nullptr;
template <class Format> constexpr ToValuePairs quantized_pairs = nullptr;
#endif

template <class Format>
constexpr Rows quantized() {
    return {Format::NBYTES, QK, floats<Format>, Format::SMALL || ANY_CODE ? codes<Format> : nullptr,
            Format::SMALL ? Format::OFFSET : SIGN, Format::MINIMA, nullptr, quantized_pairs<Format>};
}

}  // namespace

void halves_to_float(const uint8_t * p, float * out, int64_t n) {
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

const Rows * rows_of(Type type) {
    static const Rows f32 = {4, 1, floats_f32, nullptr, 0, false, nullptr, nullptr},
                      f16 = {2, 1, halves_to_float, nullptr, 0, false, key_pairs<F16>, value_pairs<F16>},
                      bf16 = {2, 1, floats_bf16, nullptr, 0, false, key_pairs<BF16>, value_pairs<BF16>}, q8_0 = quantized<Q8_0>(), q5_1 = quantized<Q5_1>(),
                      q5_0 = quantized<Q5_0>(), q4_1 = quantized<Q4_1>(), q4_0 = quantized<Q4_0>(),
                      iq4_nl = quantized<IQ4_NL>();
    switch (type) {
        case Type::f32: return &f32;
        case Type::f16: return &f16;
        case Type::bf16: return &bf16;
        case Type::q8_0: return &q8_0;
        case Type::q5_1: return &q5_1;
        case Type::q5_0: return &q5_0;
        case Type::q4_1: return &q4_1;
        case Type::q4_0: return &q4_0;
        case Type::iq4_nl: return &iq4_nl;
    }
    return nullptr;
}

}  // namespace edgekv
