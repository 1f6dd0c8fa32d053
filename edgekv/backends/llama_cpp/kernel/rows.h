// Cached rows, as they are stored, to numbers: layouts of ggml/src/ggml-common.h, values of ggml/src/ggml-quants.c.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgekv {

// Ids of enum ggml_type, the types that a row may be stored in.
enum class Type : int {
    f32 = 0, f16 = 1, q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, iq4_nl = 20, bf16 = 30
};

constexpr int64_t QK = 32;  // values of a quantized block

// A row of n values as float32.
using ToFloat = void (*)(const uint8_t * row, float * out, int64_t n);

// Up to LANES quantized rows of n values, `stride` bytes apart, as whole numbers, value = d * (code - offset) + m: codes
// (n / 4, LANES, 4), d and m (n / 32, LANES). m is written for formats with minima only.
using ToCodes = void (*)(const uint8_t * rows, size_t stride, int count, uint8_t * codes, float * d, float * m, int64_t n);

// Up to LANES rows of n values as pairs of bfloat16: (n / 2, LANES).
using ToKeyPairs = void (*)(const uint8_t * rows, size_t stride, int count, int32_t * out, int64_t n);

// Two rows of n values as pairs of bfloat16, each of both rows: (n).
using ToValuePairs = void (*)(const uint8_t * a, const uint8_t * b, int32_t * out, int64_t n);

struct Rows {
    size_t       block_nbytes;
    int64_t      block_size;
    ToFloat      to_float;
    ToCodes      to_codes;        // null: not quantized, or the machine cannot multiply such codes
    int32_t      offset;
    bool         minima;
    ToKeyPairs   to_key_pairs;    // null: as whole numbers or float32
    ToValuePairs to_value_pairs;  // null: as float32
};

// How rows of a type are read; null for a type that is not known.
const Rows * rows_of(Type type);

// Bits: 1: keys are multiplied as whole numbers; 2: keys or values as pairs of bfloat16.
inline int rounding(const Rows & rows) { return (rows.to_codes ? 1 : 0) | (rows.to_key_pairs || rows.to_value_pairs ? 2 : 0); }

// Bytes of a row of n values, which whole blocks make up.
inline size_t row_nbytes(const Rows & rows, int64_t n) { return size_t(n / rows.block_size) * rows.block_nbytes; }

// f16 to float32, which masks are as well.
void halves_to_float(const uint8_t * halves, float * out, int64_t n);

}  // namespace edgekv
