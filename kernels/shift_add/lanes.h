// SPDX-License-Identifier: Apache-2.0
// Sixteen floats at a time, on any processor, and work spread over the threads torch already has.
//
// The vectors are the compiler's own (GCC and Clang), which splits them where registers are narrower. Only what
// these cannot say is written per instruction set: a table lookup, products of bfloat16 (and in planes.h bits).
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
typedef uint16_t Shorts __attribute__((vector_size(64)));
typedef uint16_t Shorts16 __attribute__((vector_size(32)));
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

// Keeps a loaded vector in its register: GCC would read memory again for every use, and loads are what is scarce.
template <class Vector>
static inline void hold(Vector& v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#endif
}

static inline Floats all(float value) { return Floats{} + value; }

static inline float sum(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int l = 0; l < width; l++) part[l] += part[l + width];
    return part[0];
#endif
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

// ------------------------------------------------------------------------------------ stored floats

enum Type : int { FLOAT32, FLOAT16, BFLOAT16 };

static inline Floats from_half(Ints h) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)h));
#else
    const Ints magnitude = h & 0x7fff, exponent = magnitude >> 10;
    const Ints wide = (magnitude << 13) + ((exponent == 31) & (112 << 23)) + (112 << 23);
    const Ints subnormal = (Ints)(__builtin_convertvector(magnitude, Floats) * 0x1p-24f);
    const Ints value = (exponent == 0) ? subnormal : wide;
    return (Floats)(value | ((h & 0x8000) << 16));
#endif
}

// Sixteen little-endian words of 1 to 4 bytes each.
template <int BYTES>
static inline Ints words(const uint8_t* from) {
    if constexpr (BYTES == 1) return __builtin_convertvector(load<Bytes16>(from), Ints);
    if constexpr (BYTES == 2) return __builtin_convertvector(load<Shorts16>(from), Ints);
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

// Both to bfloat16, to nearest even (subnormal ones may become 0).
static inline Shorts narrowed(Floats low, Floats high) {
#if defined(__AVX512BF16__)
    return (Shorts)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
    Shorts16 half[2];
    for (int h = 0; h < 2; h++) {
        const Ints bits = (Ints)(h ? high : low), nan = (bits & 0x7fffffff) > 0x7f800000;
        const Ints rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
        half[h] = __builtin_convertvector(nan ? Ints{} + 0x7fc0 : rounded, Shorts16);
    }
    return load<Shorts>(half);
#endif
}

// Products of bfloat16 pairs, summed in float32, in one instruction (subnormal ones count as 0).
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define DOT_PRODUCTS 1

static inline Floats dot(Floats sum, Shorts a, Shorts b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// table[index & 31] per lane.
static inline Shorts lookup(Shorts table, Shorts index) {
    return (Shorts)_mm512_permutexvar_epi16((__m512i)index, (__m512i)table);
}
#else
#define DOT_PRODUCTS 0
#endif

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
