// SPDX-License-Identifier: Apache-2.0
//
// What the CPU kernels of linear attention are made of: vectors of the compiler's own (GCC, Clang) as wide as the
// processor's, e^x, one tile of matrix product, transposition, and rows of tensors of any strides and three dtypes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 8;
#define LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
constexpr int LANES = 8, TILE_ROWS = 4;
#define LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
constexpr int LANES = 4, TILE_ROWS = 4;
#define LOW_HALVES 0, 4, 1, 5
#define HIGH_HALVES 2, 6, 3, 7
#endif
constexpr int64_t BLOCK = 64;  // queries; a multiple of LANES and of TILE_ROWS

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec all(float x) { return x - Vec{}; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline Ints lane_numbers() {
  Ints n;
  for (int i = 0; i < LANES; ++i) n[i] = i;
  return n;
}

// e^x = 2^n e^r, n = round(x / ln 2), |r| ≤ ln 2 / 2; e^r by its series to r⁷/7!. Within 2 ulp; 0 below −87, ∞ above 88.
inline Vec exponential(Vec x) {
  const float round = 12582912.0f;  // 1.5 · 2²³: adding it leaves the nearest integer in the low bits
  Vec shifted = x * 1.44269504f + round, n = shifted - round;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = all(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Ints power = ((Ints)shifted << 23) + (127 << 23);
  Vec y = p * (Vec)power;
  y = x < -87.0f ? Vec{} : y;
  return x > 88.0f ? all(INFINITY) : y;
}

// C[M][V·LANES] (+)= Σ_k A(m, k) B[k][·];  A(m, k) = a[m·am + k·ak]
template <int M, int V>
void tile(const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth,
          bool add) {
  Vec sum[M][V] = {};
  for (int64_t k = 0; k < depth; ++k, a += ak, b += ldb) {
    Vec row[V];
    for (int v = 0; v < V; ++v) row[v] = load(b + v * LANES);
    for (int m = 0; m < M; ++m) {
      Vec x = all(a[m * am]);
      for (int v = 0; v < V; ++v) sum[m][v] += x * row[v];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      float* to = c + m * ldc + v * LANES;  // added last: long sums are sums of blocks' sums
      store(to, add ? load(to) + sum[m][v] : sum[m][v]);
    }
}

// rows: one, or a multiple of TILE_ROWS; columns: of LANES
inline void product(const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
             int64_t columns, int64_t depth, bool add) {
  if (rows == 1) {  // as many sums at a time as hide the latency of an addition
    int64_t n = 0;
    for (; columns - n >= 8 * LANES; n += 8 * LANES) tile<1, 8>(a, am, ak, b + n, ldb, c + n, ldc, depth, add);
    for (; columns - n >= 4 * LANES; n += 4 * LANES) tile<1, 4>(a, am, ak, b + n, ldb, c + n, ldc, depth, add);
    for (; n < columns; n += LANES) tile<1, 1>(a, am, ak, b + n, ldb, c + n, ldc, depth, add);
    return;
  }
  for (int64_t n = 0; n < columns; n += 2 * LANES)
    for (int64_t m = 0; m < rows; m += TILE_ROWS)
      if (columns - n >= 2 * LANES) tile<TILE_ROWS, 2>(a + m * am, am, ak, b + n, ldb, c + m * ldc + n, ldc, depth, add);
      else tile<TILE_ROWS, 1>(a + m * am, am, ak, b + n, ldb, c + m * ldc + n, ldc, depth, add);
}

// to[f][r] = from[r][f] for LANES rows, by log₂ LANES perfect shuffles of rows; f: a multiple of LANES
inline void transpose(const float* from, int64_t ld, float* to, int64_t ldt, int64_t features) {
  for (int64_t f = 0; f < features; f += LANES) {
    Vec x[LANES], y[LANES];
    for (int r = 0; r < LANES; ++r) x[r] = load(from + r * ld + f);
    for (int step = 1; step < LANES; step *= 2) {
      for (int r = 0; r < LANES / 2; ++r) {
        y[2 * r] = __builtin_shufflevector(x[r], x[r + LANES / 2], LOW_HALVES);
        y[2 * r + 1] = __builtin_shufflevector(x[r], x[r + LANES / 2], HIGH_HALVES);
      }
      std::memcpy(x, y, sizeof x);
    }
    for (int r = 0; r < LANES; ++r) store(to + (f + r) * ldt, x[r]);
  }
}

// Large results are fresh memory, whose first touch costs more than computing them: ask for large pages, where the
// system leaves it to the program.
inline void advise(const void* data, int64_t floats) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = 2 << 20, first = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + floats * 4) & ~(page - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)floats;
#endif
}

}  // namespace

// -- rows of a tensor; `native.py` has the same structure ------------------------------------------------------------

extern "C" struct Rows {  // [batch, heads, time, width], the last dimension contiguous; strides in elements
  const void* data;
  int64_t heads, batch, head, row, width, type;  // type: 0 float32, 1 bfloat16, 2 float16
};

namespace {

inline void widen(const Rows& x, const char* from, float* to) {
  if (x.type == 0) {
    std::memcpy(to, from, x.width * 4);
    return;
  }
  const uint16_t* half = reinterpret_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < x.width; ++i) {
    uint32_t bits = uint32_t(half[i]) << 16;
    if (x.type == 2) {  // float16: exponent and mantissa moved down, then the exponent's bias corrected by 2^112
      const uint32_t sign = bits & 0x80000000u, rest = uint32_t(half[i] & 0x7fff) << 13;
      float value;
      std::memcpy(&value, &rest, 4);
      value *= 0x1p112f;
      std::memcpy(&bits, &value, 4);
      if ((half[i] & 0x7c00) == 0x7c00) bits |= 0x7f800000u;
      bits |= sign;
    }
    std::memcpy(to + i, &bits, 4);
  }
}

inline const char* at(const Rows& x, int64_t batch, int64_t head, int64_t of, int64_t time) {
  const int64_t size = x.type == 0 ? 4 : 2, own = head / (of / x.heads);
  return static_cast<const char*>(x.data) + (batch * x.batch + own * x.head + time * x.row) * size;
}

}  // namespace
