// SPDX-License-Identifier: Apache-2.0
// bfloat16, sixteen numbers at a time, and exponentials.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

struct BFloat {
    uint16_t bits;
    BFloat() = default;
    explicit BFloat(float x) {  // nearest, ties to even; NaN stays NaN
        uint32_t b;
        memcpy(&b, &x, 4);
        bits = x != x ? (uint16_t)(b >> 16 | 0x40) : (uint16_t)((b + 0x7FFF + (b >> 16 & 1)) >> 16);
    }
    explicit operator float() const {
        const uint32_t b = (uint32_t)bits << 16;
        float x;
        memcpy(&x, &b, 4);
        return x;
    }
};

#ifdef __AVX512F__
inline __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

inline __m256i narrowed(__m512 x) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 undefined = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(nearest, undefined, quiet), 16));
#endif
}

inline void store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
inline void store(BFloat* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, narrowed(x)); }

// e^x = 2^n e^r with |r| ≤ ln 2 / 2, where eight terms of the series are exact to a fourth of a unit in the last place.
inline __m512 exponential(__m512 x) {
    auto all = [](float value) { return _mm512_set1_ps(value); };
    x = _mm512_max_ps(all(-104.0f), _mm512_min_ps(all(89.0f), x));  // 0 and infinity; a NaN is the second operand and stays
    const __m512 n = _mm512_roundscale_ps(x * all(1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, all(0.693359375f), x);  // ln 2 in two parts, the first of few bits: n times it is exact
    r = _mm512_fnmadd_ps(n, all(-2.12194440e-4f), r);
    __m512 sum = all(1.0f / 5040);
    for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        sum = _mm512_fmadd_ps(sum, r, all(term));
    return _mm512_scalef_ps(sum, n);
}
#endif

inline void exponentials(float* x, long count) {
    long i = 0;
#ifdef __AVX512F__
    for (; i + 16 <= count; i += 16) _mm512_storeu_ps(x + i, exponential(_mm512_loadu_ps(x + i)));
#endif
    for (; i < count; i++) x[i] = expf(x[i]);
}

}  // namespace
