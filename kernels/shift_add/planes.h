// SPDX-License-Identifier: Apache-2.0
// Planes of bits to words: the transposition that binary codes need before a word can be looked up.
#pragma once

#include "lanes.h"

// Four planes of 128 bits -> sixteen lanes of eight 4-bit words: bits 4k to 4k + 3 of lane l are the four planes at
// position 64 * (k & 1) + 4 * l + (k >> 1).
static inline Ints transposed(const uint8_t* p0, const uint8_t* p1, const uint8_t* p2, const uint8_t* p3) {
    const Bytes16 a = load<Bytes16>(p0), b = load<Bytes16>(p1), c = load<Bytes16>(p2), d = load<Bytes16>(p3);
#define LOW8 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH8 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define LOW16 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23
#define HIGH16 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31
#define LOW32 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23
#define HIGH32 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31
    const Bytes16 ab0 = __builtin_shufflevector(a, b, LOW8), cd0 = __builtin_shufflevector(c, d, LOW8);
    const Bytes16 ab1 = __builtin_shufflevector(a, b, HIGH8), cd1 = __builtin_shufflevector(c, d, HIGH8);
    // Dword q of (u0, u1): the four planes at byte q; of (v0, v1): at byte q + 8.
    const Bytes16 u0 = __builtin_shufflevector(ab0, cd0, LOW16), u1 = __builtin_shufflevector(ab0, cd0, HIGH16);
    const Bytes16 v0 = __builtin_shufflevector(ab1, cd1, LOW16), v1 = __builtin_shufflevector(ab1, cd1, HIGH16);
    const Bytes16 quads[4] = {
        __builtin_shufflevector(u0, v0, LOW32), __builtin_shufflevector(u0, v0, HIGH32),
        __builtin_shufflevector(u1, v1, LOW32), __builtin_shufflevector(u1, v1, HIGH32)};
#undef LOW8
#undef HIGH8
#undef LOW16
#undef HIGH16
#undef LOW32
#undef HIGH32
    // Transposing 8 x 8 bits: swap 1 x 1 blocks within 2 x 2, then 2 x 2 within 4 x 4, then 4 x 4 (Warren, "Hacker's
    // Delight", 7-3).
    Quads m = load<Quads>(quads);
    Quads t = (m ^ (m >> 7)) & 0x00AA00AA00AA00AA;
    m ^= t ^ (t << 7);
    t = (m ^ (m >> 14)) & 0x0000CCCC0000CCCC;
    m ^= t ^ (t << 14);
    t = (m ^ (m >> 28)) & 0x00000000F0F0F0F0;
    return (Ints)(m ^ t ^ (t << 28));
}

// The first `count` (at least 1) of 64 bytes, zeros behind them. Reads no more than these.
static inline Bytes load_bytes(const uint8_t* from, long count) {
    if (count >= 64) return load<Bytes>(from);
#if defined(__AVX512BW__)
    return (Bytes)_mm512_maskz_loadu_epi8(~0ull >> (64 - count), from);
#else
    Bytes v{};
    memcpy(&v, from, count);
    return v;
#endif
}

// Four times `transposed`: of sixteen bytes of every plane each.
static inline void transposed(Ints words[4], const Bytes planes[4]) {
#if defined(__AVX512VBMI__) && defined(__GFNI__)
    // Byte 7 - r of quad q: plane r at byte q for r < 4, plane r - 4 at byte q + 8 above; then an 8 x 8 transposition
    // of bits per quad: "A x" over GF(2) with the unit vectors for x is a transposition of A.
    alignas(64) static const uint8_t order[2][64] = {
        {104, 72, 40, 8,  96,  64, 32, 0,  105, 73, 41, 9,  97,  65, 33, 1,  106, 74, 42, 10, 98,  66,
         34,  2,  107, 75, 43, 11, 99, 67, 35,  3,  108, 76, 44, 12, 100, 68, 36,  4,  109, 77, 45, 13,
         101, 69, 37,  5,  110, 78, 46, 14, 102, 70, 38, 6,  111, 79, 47, 15, 103, 71, 39, 7},
        {120, 88, 56, 24, 112, 80, 48, 16, 121, 89, 57, 25, 113, 81, 49, 17, 122, 90, 58, 26, 114, 82,
         50,  18, 123, 91, 59, 27, 115, 83, 51, 19, 124, 92, 60, 28, 116, 84, 52, 20, 125, 93, 61, 29,
         117, 85, 53, 21, 126, 94, 62, 30, 118, 86, 54, 22, 127, 95, 63, 31, 119, 87, 55, 23}};
    const __m512i a = (__m512i)planes[0], b = (__m512i)planes[1], c = (__m512i)planes[2], d = (__m512i)planes[3];
    const __m512i ab[2] = {_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee)};
    const __m512i cd[2] = {_mm512_shuffle_i32x4(c, d, 0x44), _mm512_shuffle_i32x4(c, d, 0xee)};
    UNROLLED
    for (int q = 0; q < 4; q++) {
        const __m512i z = _mm512_permutex2var_epi8(ab[q / 2], _mm512_load_si512(order[q % 2]), cd[q / 2]);
        words[q] = (Ints)_mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(0x8040201008040201), z, 0);
    }
#else
    uint8_t copy[4][64];
    memcpy(copy, planes, sizeof copy);
    for (int q = 0; q < 4; q++)
        words[q] = transposed(&copy[0][16 * q], &copy[1][16 * q], &copy[2][16 * q], &copy[3][16 * q]);
#endif
}
