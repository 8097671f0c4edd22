// SPDX-License-Identifier: Apache-2.0
// Sixteen floats at a time, on any processor, and work spread over the threads torch already has.
//
// The vectors are the compiler's own (GCC and Clang), which splits them where registers are narrower. Only what
// these cannot say is written per instruction set: a table lookup and a transposition of bits.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint64_t Quads __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef uint8_t Bytes16 __attribute__((vector_size(16)));

constexpr int LANES = 16;

#define UNROLLED _Pragma("GCC unroll 8")

template <class Vector>
static inline Vector load(const void* from) {
    Vector v;
    memcpy(&v, from, sizeof v);
    return v;
}

template <class Vector>
static inline void store(void* to, Vector v) {
    memcpy(to, &v, sizeof v);
}

static inline Floats all(float value) { return Floats{} + value; }

static inline float sum(Floats v) {
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int l = 0; l < width; l++) part[l] += part[l + width];
    return part[0];
}

// table[index & 15] per lane.
static inline Floats lookup(Floats table, Ints index) {
#if defined(__AVX512F__)
    return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif defined(__AVX2__)
    __m256 low, high, found[2];
    __m256i half[2];
    memcpy(&low, &table, 32);
    memcpy(&high, (const char*)&table + 32, 32);
    memcpy(half, &index, 64);
    for (int h = 0; h < 2; h++) {
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(half[h], 28));  // bit 3 to where blendv looks
        const __m256 a = _mm256_permutevar8x32_ps(low, half[h]), b = _mm256_permutevar8x32_ps(high, half[h]);
        found[h] = _mm256_blendv_ps(a, b, upper);
    }
    return load<Floats>(found);
#else
    Floats found;
    for (int l = 0; l < LANES; l++) found[l] = table[index[l] & 15];
    return found;
#endif
}

// table[index] per lane, from memory.
static inline Floats gather(const float* table, Ints index) {
#if defined(__AVX512F__)
    return (Floats)_mm512_i32gather_ps((__m512i)index, table, 4);
#else
    Floats found;
    for (int l = 0; l < LANES; l++) found[l] = table[index[l]];
    return found;
#endif
}

// Four planes of 128 bits -> sixteen lanes of eight 4-bit words: bits 4k to 4k + 3 of lane l are the four planes at
// position 64 * (k & 1) + 4 * l + (k >> 1).
static inline Ints transposed(const uint8_t* p0, const uint8_t* p1, const uint8_t* p2, const uint8_t* p3) {
#if defined(__AVX512VBMI__) && defined(__GFNI__)
    // Byte 7 - r of quad q: plane r at byte q for r < 4, plane r - 4 at byte q + 8 above; then an 8 x 8 transposition
    // of bits per quad. "A x" over GF(2) with the unit vectors for x is a transposition of A.
    alignas(64) static const uint8_t order[64] = {
        56, 40, 24, 8,  48, 32, 16, 0, 57, 41, 25, 9,  49, 33, 17, 1, 58, 42, 26, 10, 50, 34,
        18, 2,  59, 43, 27, 11, 51, 35, 19, 3, 60, 44, 28, 12, 52, 36, 20, 4,  61, 45, 29, 13,
        53, 37, 21, 5,  62, 46, 30, 14, 54, 38, 22, 6, 63, 47, 31, 15, 55, 39, 23, 7};
    __m512i z = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p0));
    z = _mm512_inserti32x4(z, _mm_loadu_si128((const __m128i*)p1), 1);
    z = _mm512_inserti32x4(z, _mm_loadu_si128((const __m128i*)p2), 2);
    z = _mm512_inserti32x4(z, _mm_loadu_si128((const __m128i*)p3), 3);
    z = _mm512_permutexvar_epi8(_mm512_load_si512(order), z);
    return (Ints)_mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(0x8040201008040201), z, 0);
#else
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
#endif
}

// ------------------------------------------------------------------------------------ stored floats

enum Type : int { FLOAT32, FLOAT16, BFLOAT16 };

static inline Floats from_half(Ints h) {
    const Ints magnitude = h & 0x7fff, exponent = magnitude >> 10;
    const Ints wide = (magnitude << 13) + ((exponent == 31) & (112 << 23)) + (112 << 23);
    const Ints subnormal = (Ints)(__builtin_convertvector(magnitude, Floats) * 0x1p-24f);
    const Ints value = (exponent == 0) ? subnormal : wide;
    return (Floats)(value | ((h & 0x8000) << 16));
}

// Sixteen little-endian words of 1 to 4 bytes each.
template <int BYTES>
static inline Ints words(const uint8_t* from) {
    typedef uint16_t Shorts __attribute__((vector_size(32)));
    if constexpr (BYTES == 1) return __builtin_convertvector(load<Bytes16>(from), Ints);
    if constexpr (BYTES == 2) return __builtin_convertvector(load<Shorts>(from), Ints);
    if constexpr (BYTES == 4) return load<Ints>(from);
    Bytes packed{};
    memcpy(&packed, from, LANES * 3);
    return (Ints)__builtin_shufflevector(
        packed, Bytes{}, 0, 1, 2, 64, 3, 4, 5, 64, 6, 7, 8, 64, 9, 10, 11, 64, 12, 13, 14, 64, 15, 16, 17, 64, 18, 19,
        20, 64, 21, 22, 23, 64, 24, 25, 26, 64, 27, 28, 29, 64, 30, 31, 32, 64, 33, 34, 35, 64, 36, 37, 38, 64, 39, 40,
        41, 64, 42, 43, 44, 64, 45, 46, 47, 64);
}

// Elements first to first + count - 1 (at most 16) of an array; the other lanes are 0. Reads no more than these.
static inline Floats load_floats(const void* array, Type type, long first, long count) {
    if (type == FLOAT32) {
        Floats v{};
        if (count == LANES) return load<Floats>((const float*)array + first);
        memcpy(&v, (const float*)array + first, count * sizeof(float));
        return v;
    }
    const uint8_t* from = (const uint8_t*)array + first * sizeof(uint16_t);
    uint8_t part[LANES * sizeof(uint16_t)] = {};
    if (count < LANES) memcpy(part, from, count * sizeof(uint16_t));
    const Ints wide = words<2>(count < LANES ? part : from);
    return type == BFLOAT16 ? (Floats)(wide << 16) : from_half(wide);
}

// ------------------------------------------------------------------------------------ threads

// Of whichever OpenMP runtime torch has loaded; naming the symbol here instead of linking one keeps it at one.
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Calls body(first, last) for pieces of 0 .. count - 1 until all are done, on the given number of threads.
template <class Body>
static void spread(long count, long piece, int threads, const Body& body) {
    struct Shared {
        const Body& body;
        long count, piece;
        std::atomic<long> next;
    } shared{body, count, piece, {0}};
    const auto work = [](void* data) {
        Shared& s = *static_cast<Shared*>(data);
        for (;;) {
            const long first = s.next.fetch_add(s.piece, std::memory_order_relaxed);
            if (first >= s.count) return;
            s.body(first, first + s.piece < s.count ? first + s.piece : s.count);
        }
    };
    if (threads <= 1 || count <= piece)
        work(&shared);
    else
        GOMP_parallel(work, &shared, (unsigned)threads, 0);
}
