// SPDX-License-Identifier: Apache-2.0
// l = h Cᵀ for a few rows of h, in AVX-512: sixteen dot products at a time, 16 codes by one row or 2 codes by eight.
//
// Rows of C and h are read as they lie, along the width. Each dot product has a vector of partial sums; sixteen of these are
// added up lane by lane together. So nothing is packed, and the result does not depend on threads or on the other rows.
#pragma once
#include "numbers.h"
#include <algorithm>
#ifdef __AVX512F__
#define OWN_PRODUCT

namespace {

constexpr long SIDE = 8;               // rows that are multiplied together
constexpr long BLOCK_BYTES = 98304;    // of C, which all rows use before the next: with that one, less than a second cache
constexpr long AHEAD = 4;              // rows of C asked for early, where each is used once

template <class T> struct Lanes;

template <> struct Lanes<float> {
    static constexpr long COUNT = 16;
    static __m512 load(const float* p) { return _mm512_loadu_ps(p); }
    static __m512 load(const float* p, long count) { return _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p); }
    static __m512 add(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
};

template <> struct Lanes<BFloat> {
    static constexpr long COUNT = 32;
    static __m512i load(const BFloat* p) { return _mm512_loadu_si512(p); }
    static __m512i load(const BFloat* p, long count) {
        alignas(64) uint16_t padded[COUNT] = {};
        memcpy(padded, p, 2 * count);
        return _mm512_load_si512(padded);
    }
    static __m512 add(__m512 sum, __m512i a, __m512i b) {
#ifdef __AVX512BF16__
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
        auto even = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
        auto odd = [](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xFFFF0000u))); };
        return _mm512_fmadd_ps(odd(a), odd(b), _mm512_fmadd_ps(even(a), even(b), sum));
#endif
    }
};

// Lane i is the sum of the lanes of a[i].
inline __m512 totals(const __m512 a[16]) {
    __m512 two[8], four[4];
    for (int i = 0; i < 8; i++)
        two[i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]) + _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
    for (int i = 0; i < 4; i++) {
        const __m512d p = _mm512_castps_pd(two[2 * i]), q = _mm512_castps_pd(two[2 * i + 1]);
        four[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, q)) + _mm512_castpd_ps(_mm512_unpackhi_pd(p, q));
    }
    auto halves = [](__m512 p, __m512 q) { return _mm512_shuffle_f32x4(p, q, 0x88) + _mm512_shuffle_f32x4(p, q, 0xDD); };
    return halves(halves(four[0], four[1]), halves(four[2], four[3]));
}

// What is asked of memory while something else is multiplied: a line of each of some rows at every step.
template <class T> struct Early {
    const T* from;
    long stride;  // between the rows
    long step;    // bytes
};

// sum[j · ROWS + r] = the partial sums of c[j] · x[r].
template <class T, int CODES, int ROWS>
inline __attribute__((always_inline)) void multiply(const T* const* c, const T* const* x, long width, Early<T> early,
                                                    __m512* sum) {
    typedef Lanes<T> L;
#pragma GCC unroll 16
    for (int i = 0; i < CODES * ROWS; i++) sum[i] = _mm512_setzero_ps();
    auto step = [&](auto load) __attribute__((always_inline)) {
        decltype(load(c[0])) a[CODES];
#pragma GCC unroll 16
        for (int j = 0; j < CODES; j++) a[j] = load(c[j]);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const auto b = load(x[r]);
#pragma GCC unroll 16
            for (int j = 0; j < CODES; j++) sum[j * ROWS + r] = L::add(sum[j * ROWS + r], a[j], b);
        }
    };
    long k = 0;
    const char* line = (const char*)early.from;
    for (; k + L::COUNT <= width; k += L::COUNT, line += early.step) {
        step([=](const T* p) { return L::load(p + k); });
#pragma GCC unroll 16
        for (int j = 0; j < CODES; j++) _mm_prefetch(line + j * early.stride * (long)sizeof(T), _MM_HINT_T1);
    }
    if (k < width) step([=](const T* p) { return L::load(p + k, width - k); });
}

// C, `stride` numbers from a row to the next.
template <class T> struct Book {
    const T* codes;
    long stride, count, width;

    const T* row(long j) const { return codes + std::min(j, count - 1) * stride; }
    long block() const { return std::max(16L, BLOCK_BYTES / (width * (long)sizeof(T) + 1) / 16 * 16); }
};

// Of codes first to last, both multiples of 16, to l[j].
template <class T> void one_row(const Book<T>& book, const T* h, long first, long last, T* l) {
    for (long j = first; j < last; j += 16) {
        __m512 sum[16];
#pragma GCC unroll 4
        for (int q = 0; q < 16; q += 4) {
            const T* c[4] = {book.row(j + q), book.row(j + q + 1), book.row(j + q + 2), book.row(j + q + 3)};
            multiply<T, 4, 1>(c, &h, book.width, {book.codes + (j + q + AHEAD) * book.stride, book.stride, 64}, sum + q);
        }
        store(l + j, totals(sum));
    }
}

// The same for SIDE rows, to l[j · SIDE + r]. Where `groups` of them use a block of C, each asks for its part of the next.
template <class T>
void rows_together(const Book<T>& book, const T* const h[SIDE], long first, long last, long group, long groups, T* l) {
    const long ahead = groups == 1 ? AHEAD : book.block(), part = book.width * group / groups;
    for (long j = first; j < last; j += 2) {
        __m512 sum[16];
        const T* c[2] = {book.row(j), book.row(j + 1)};
        const Early<T> early = {book.codes + (j + ahead) * book.stride + part, book.stride, 64 / groups};
        multiply<T, 2, SIDE>(c, h, book.width, early, sum);
        store(l + j * SIDE, totals(sum));
    }
}

}  // namespace
#endif
