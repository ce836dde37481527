// Products of few tokens with a matrix in 32, 16, 8 or 4 bits, and the small vector functions around them.
//
// Each weight is read once, straight into sums in fp32. A sum runs over its inputs in the same order for however many tokens.
//
// Shapes: M tokens, K inputs and N outputs of a product.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));

inline Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }
inline Vec all(float value) { return Vec{} + value; }
inline float sum(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
    return (v[0] + v[1]) + (v[2] + v[3]);
#endif
}

// e^x to two units in the last place: 2^n times a polynomial of the rest (Cephes' coefficients).
inline Vec exponential(Vec x) {
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    const Vec magic = all(12582912.0f);
    const Vec n = (x * 1.44269504088896341f + magic) - magic;
    const Vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
    Vec scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

// A function of vectors over n numbers; the last few go through a filled vector.
template <class Function>
inline void apply(int64_t n, float* to, Function function) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, function(i, LANES));
    if (i < n) {
        const Vec v = function(i, int(n - i));
        for (int j = 0; i + j < n; j++) to[i + j] = v[j];
    }
}
inline Vec load_some(const float* from, int count) {
    if (count == LANES) return load(from);
    Vec v{};
    for (int j = 0; j < count; j++) v[j] = from[j];
    return v;
}
inline float dot(const float* a, const float* b, int64_t n) {
    Vec total{};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) total += load(a + i) * load(b + i);
    float rest = 0;
    for (; i < n; i++) rest += a[i] * b[i];
    return sum(total) + rest;
}

// ---------------------------------------------------------------------------------------------- products with weights

enum Kind : int32_t { FLOAT32 = 0, FLOAT16 = 1, INT8 = 2, INT4 = 3 };

struct Matrix {
    const void* weight;      // [N, K]; int4: [N, K'/2], input 2i in the low half of byte i
    const void* scale;       // int8: fp32 [N]; int4: bf16 [N, groups]
    const void* offset;      // int4: bf16 [N, groups], the value of level 8
    const float* bias;       // [N] or null
    int64_t outputs, inputs;
    int32_t kind, group;
    int32_t levels;          // activations are rounded to so many whole numbers on each side of 0; 0: not at all
};

inline float wide(uint16_t bf16) {
    const uint32_t bits = uint32_t(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// How a row of weights becomes fp32: `at` gives LANES of them, `one` a single one, and `scaled` what a sum is in the end.
struct Float32 {
    const float* row;
    Float32() = default;
    Float32(const Matrix& m, int64_t n) : row((const float*)m.weight + n * m.inputs) {}
    Vec at(int64_t k) const { return load(row + k); }
    float one(int64_t k) const { return row[k]; }
    float scaled(float total) const { return total; }
};

struct Float16 {
    const uint16_t* row;
    Float16() = default;
    Float16(const Matrix& m, int64_t n) : row((const uint16_t*)m.weight + n * m.inputs) {}
    Vec at(int64_t k) const {
#if defined(__AVX512F__)
        return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(row + k)));
#elif defined(__AVX2__) && defined(__F16C__)
        return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(row + k)));
#else
        Vec v;
        for (int i = 0; i < LANES; i++) v[i] = one(k + i);
        return v;
#endif
    }
    float one(int64_t k) const {
        _Float16 half;
        std::memcpy(&half, row + k, sizeof half);
        return float(half);
    }
    float scaled(float total) const { return total; }
};

struct Int8 {
    const int8_t* row;
    float scale;
    Int8() = default;
    Int8(const Matrix& m, int64_t n) : row((const int8_t*)m.weight + n * m.inputs), scale(((const float*)m.scale)[n]) {}
    Vec at(int64_t k) const {
#if defined(__AVX512F__)
        return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(row + k))));
#elif defined(__AVX2__)
        return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(row + k))));
#else
        Vec v;
        for (int i = 0; i < LANES; i++) v[i] = row[k + i];
        return v;
#endif
    }
    float one(int64_t k) const { return row[k]; }
    float scaled(float total) const { return total * scale; }
};

struct Int4 {
    const uint8_t* row;
    const uint16_t *scales, *offsets;
    int32_t group;
    Int4() = default;
    Int4(const Matrix& m, int64_t n) : group(m.group) {
        const int64_t groups = (m.inputs + group - 1) / group;
        row = (const uint8_t*)m.weight + n * groups * group / 2;
        scales = (const uint16_t*)m.scale + n * groups;
        offsets = (const uint16_t*)m.offset + n * groups;
    }
    Vec at(int64_t k) const {
        Vec levels;
#if defined(__AVX512F__)
        const __m128i bytes = _mm_loadl_epi64((const __m128i*)(row + k / 2)), low = _mm_set1_epi8(15);
        const __m128i halves = _mm_unpacklo_epi8(_mm_and_si128(bytes, low), _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
        levels = (Vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(halves));
#elif defined(__AVX2__)
        int32_t four;
        std::memcpy(&four, row + k / 2, sizeof four);
        const __m128i bytes = _mm_cvtsi32_si128(four), low = _mm_set1_epi8(15);
        const __m128i halves = _mm_unpacklo_epi8(_mm_and_si128(bytes, low), _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
        levels = (Vec)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(halves));
#else
        for (int i = 0; i < LANES; i++) levels[i] = level(k + i);
#endif
        const int64_t g = k / group;
        return (levels - 8.0f) * wide(scales[g]) + wide(offsets[g]);
    }
    float level(int64_t k) const { return k % 2 ? row[k / 2] >> 4 : row[k / 2] & 15; }
    float one(int64_t k) const { return (level(k) - 8.0f) * wide(scales[k / group]) + wide(offsets[k / group]); }
    float scaled(float total) const { return total; }
};

// What a product reads: M tokens of K numbers, and where they are whole numbers, what each token's sums are multiplied by.
struct Inputs {
    const float* x;
    const float* scales;
};

// The sums of LANES vectors in one vector, added in the order of `sum`: each round joins two halves.
template <int HALF>
inline Vec joined(Vec a, Vec b) {
    IntVec low, high;
    for (int i = 0; i < LANES; i++) {
        // Within each piece of 2 * HALF lanes the first half comes from a's sums so far, the second from b's.
        const int piece = i / HALF % (LANES / HALF), from = piece < LANES / HALF / 2 ? 0 : LANES;
        const int at = from + piece % (LANES / HALF / 2) * 2 * HALF + i % HALF;
        low[i] = at;
        high[i] = at + HALF;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}
template <int HALF>
inline Vec joined_all(const Vec* totals) {
    if constexpr (HALF == LANES) return totals[0];
    else {
        constexpr int apart = LANES / HALF / 2;
        return joined<HALF>(joined_all<2 * HALF>(totals), joined_all<2 * HALF>(totals + apart));
    }
}

// R outputs from n on of M tokens: y[m][n + r] = x[m] · weight[n + r].
template <class Row, int R, int M>
inline void tile(const Matrix& w, int64_t n, Inputs in, float* y, int64_t ldy) {
    const int64_t K = w.inputs;
    Vec total[R * M] = {};
    Row rows[R];
    for (int r = 0; r < R; r++) rows[r] = Row(w, n + r);
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) {
        Vec weights[R];
        for (int r = 0; r < R; r++) weights[r] = rows[r].at(k);
        for (int m = 0; m < M; m++) {
            const Vec inputs = load(in.x + m * K + k);
            for (int r = 0; r < R; r++) total[m * R + r] += weights[r] * inputs;
        }
    }
    float sums[R * M];
    if constexpr (R * M == LANES) store(sums, joined_all<1>(total));
    else
        for (int i = 0; i < R * M; i++) sums[i] = sum(total[i]);
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) {
            float rest = 0;
            for (int64_t i = k; i < K; i++) rest += rows[r].one(i) * in.x[m * K + i];
            const float scaled = rows[r].scaled(sums[m * R + r] + rest) * (in.scales ? in.scales[m] : 1.0f);
            y[m * ldy + n + r] = scaled + (w.bias ? w.bias[n + r] : 0.0f);
        }
}

// Outputs `from` to `to` of M of the tokens from m on, as many as there are registers for at once.
template <class Row, int M>
inline void tiles(const Matrix& w, int64_t from, int64_t to, Inputs in, int64_t& m, int64_t tokens, float* y, int64_t ldy) {
    constexpr int R = std::min(8, LANES / M);  // more rows of weights at once read memory more slowly
    for (; m + M <= tokens; m += M) {
        const Inputs some = {in.x + m * w.inputs, in.scales ? in.scales + m : nullptr};
        int64_t n = from;
        for (; n + R <= to; n += R) tile<Row, R, M>(w, n, some, y + m * ldy, ldy);
        for (; n < to; n++) tile<Row, 1, M>(w, n, some, y + m * ldy, ldy);
    }
}
// Outputs `from` to `to` of all tokens; the weights of LANES outputs stay in a near cache while the tokens pass.
template <class Row>
void outputs_of(const Matrix& w, int64_t from, int64_t to, Inputs in, int64_t tokens, float* y, int64_t ldy) {
    for (int64_t n = from; n < to; n += LANES) {
        const int64_t end = std::min(to, n + LANES);
        int64_t m = 0;
        if constexpr (LANES >= 8) tiles<Row, 4>(w, n, end, in, m, tokens, y, ldy);
        tiles<Row, 2>(w, n, end, in, m, tokens, y, ldy);
        tiles<Row, 1>(w, n, end, in, m, tokens, y, ldy);
    }
}
void multiply(const Matrix& w, int64_t from, int64_t to, Inputs in, int64_t M, float* y, int64_t ldy) {
    switch (w.kind) {
        case FLOAT32: return outputs_of<Float32>(w, from, to, in, M, y, ldy);
        case FLOAT16: return outputs_of<Float16>(w, from, to, in, M, y, ldy);
        case INT8: return outputs_of<Int8>(w, from, to, in, M, y, ldy);
        default: return outputs_of<Int4>(w, from, to, in, M, y, ldy);
    }
}

// Memory for n numbers that a thread keeps.
float* room(std::vector<float>& held, int64_t n) {
    if (int64_t(held.size()) < n) held.resize(n);
    return held.data();
}

// M tokens as a product reads them, which may be rounded.
Inputs inputs_of(const Matrix& w, const float* x, int64_t M) {
    if (!w.levels) return {x, nullptr};
    static thread_local std::vector<float> held;
    const int64_t K = w.inputs;
    float *rounded = room(held, M * (K + 1)), *scales = rounded + M * K;
    const Vec magic = all(12582912.0f);
    for (int64_t m = 0; m < M; m++) {
        const float* token = x + m * K;
        float largest = 1.17549435e-38f;
        for (int64_t k = 0; k < K; k++) largest = std::max(largest, std::fabs(token[k]));
        scales[m] = largest / w.levels;
        apply(K, rounded + m * K, [&](int64_t k, int c) { return load_some(token + k, c) / scales[m] + magic - magic; });
    }
    return {rounded, scales};
}

}  // namespace
