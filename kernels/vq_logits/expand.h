// SPDX-License-Identifier: Apache-2.0
// out[r, i] = l[code_i, r] + b_i: of one row, or of eight rows at once, whose numbers of a code lie side by side.
//
// For eight rows a code is looked up once: 16 bytes, 4 or 8 numbers, of 16 or 32 tokens are transposed in registers. Stores
// are ordinary ones: past the cache they take up to 40 % less, but then whoever reads the logits next takes that and more.
#pragma once
#include "numbers.h"

namespace {

template <class T> inline T biased(T l, const float* bias, long i) { return bias == nullptr ? l : (T)((float)l + bias[i]); }

// Sixteen bytes of numbers: put together in a register and stored at once, for stores of one number are what takes long.
template <class T> struct Sixteen;
template <> struct Sixteen<float> {
    typedef float Vector __attribute__((vector_size(16)));
    static Vector at(const float* l, const int32_t* c) { return Vector{l[c[0]], l[c[1]], l[c[2]], l[c[3]]}; }
};
template <> struct Sixteen<BFloat> {
    typedef uint16_t Vector __attribute__((vector_size(16)));
    static Vector at(const BFloat* l, const int32_t* c) {
        auto bits = [=](int n) { return l[c[n]].bits; };
        return Vector{bits(0), bits(1), bits(2), bits(3), bits(4), bits(5), bits(6), bits(7)};
    }
};

template <class T> void expand_row(const T* l, const int32_t* code, const float* bias, long count, T* out) {
    constexpr long WHOLE = 16 / sizeof(T);
    long i = 0;
    for (; bias == nullptr && i + WHOLE <= count; i += WHOLE) {
        const auto x = Sixteen<T>::at(l, code + i);
        memcpy(out + i, &x, 16);
    }
    for (; i < count; i++) out[i] = biased(l[code[i]], bias, i);
}

#ifdef __AVX512F__
// 16 bytes at `from` + `size` · code of the tokens 0, apart, 2 · apart and 3 · apart.
inline __m512i looked_up(const void* from, long size, const int32_t* code, int apart) {
    auto at = [=](int n) { return _mm_loadu_si128((const __m128i*)((const char*)from + size * code[n * apart])); };
    __m512i x = _mm512_castsi128_si512(at(0));
    x = _mm512_inserti32x4(x, at(1), 1);
    x = _mm512_inserti32x4(x, at(2), 2);
    return _mm512_inserti32x4(x, at(3), 3);
}

inline void put(float* out, __m512i x, const float* bias) {
    const __m512 l = _mm512_castsi512_ps(x);
    _mm512_storeu_ps(out, bias == nullptr ? l : l + _mm512_loadu_ps(bias));
}

inline void put(BFloat* out, __m512i x, const float* bias) {
    if (bias != nullptr) {
        const __m256i low = narrowed(widened(_mm512_castsi512_si256(x)) + _mm512_loadu_ps(bias));
        const __m256i high = narrowed(widened(_mm512_extracti64x4_epi64(x, 1)) + _mm512_loadu_ps(bias + 16));
        x = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    _mm512_storeu_si512(out, x);
}

// Tokens 4 k + q of register q become row after row: 4 × 4 in each of its four parts.
inline void expand_whole(const float* l, const int32_t* code, const float* bias, float* const out[8], long i) {
    for (int half = 0; half < 8; half += 4) {
        __m512i a[4];
        for (int q = 0; q < 4; q++) a[q] = looked_up(l + half, 8 * sizeof(float), code + i + q, 4);
        const __m512i b[4] = {_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]),
                              _mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3])};
        for (int q = 0; q < 2; q++) {
            put(out[half + 2 * q] + i, _mm512_unpacklo_epi64(b[q], b[q + 2]), bias);
            put(out[half + 2 * q + 1] + i, _mm512_unpackhi_epi64(b[q], b[q + 2]), bias);
        }
    }
}

// Tokens 8 k + q of register q: 8 × 8 in each part.
inline void expand_whole(const BFloat* l, const int32_t* code, const float* bias, BFloat* const out[8], long i) {
    __m512i a[8], b[8];
    for (int q = 0; q < 8; q++) a[q] = looked_up(l, 8 * sizeof(BFloat), code + i + q, 8);
    for (int q = 0; q < 8; q += 2) {
        b[q] = _mm512_unpacklo_epi16(a[q], a[q + 1]);
        b[q + 1] = _mm512_unpackhi_epi16(a[q], a[q + 1]);
    }
    for (int q = 0; q < 8; q += 4)
        for (int half = 0; half < 2; half++) {
            a[q + 2 * half] = _mm512_unpacklo_epi32(b[q + half], b[q + half + 2]);
            a[q + 2 * half + 1] = _mm512_unpackhi_epi32(b[q + half], b[q + half + 2]);
        }
    for (int q = 0; q < 4; q++) {
        put(out[2 * q] + i, _mm512_unpacklo_epi64(a[q], a[q + 4]), bias);
        put(out[2 * q + 1] + i, _mm512_unpackhi_epi64(a[q], a[q + 4]), bias);
    }
}
#endif

// out[r] for every row r, also for those nobody wants.
template <class T> void expand_rows(const T* l, const int32_t* code, const float* bias, long count, T* const out[8]) {
    long i = 0;
#ifdef __AVX512F__
    constexpr long WHOLE = 64 / sizeof(T);
    for (; i + WHOLE <= count; i += WHOLE) expand_whole(l, code, bias == nullptr ? bias : bias + i, out, i);
#endif
    for (; i < count; i++)
        for (long r = 0; r < 8; r++) out[r][i] = biased(l[code[i] * 8 + r], bias, i);
}

}  // namespace
