// SPDX-License-Identifier: Apache-2.0
//
// Feature maps in one pass: read x, multiply by a head's parameters, write features. `features.py` has the formulas.
//
// The work is cut into blocks of tokens of one head, which stay in the first cache between the product and the
// exponentials. Every token is computed on its own, so that neither the cut nor the number of threads changes a result.

#include "blocks.h"

extern "C" {

enum Kind : int64_t { ELU, HEDGEHOG, EXP, LANDMARK };

struct Features {
  Rows x;
  const float *weight, *bias, *gain_weight, *gain_bias;  // [heads, D, M], [heads, M]; null where a kind has none
  float* out;                                            // [batch, heads, time, F]
  int64_t batch, length, columns, kind, threads;         // columns: M
  float scale, largest;                                  // of x; of exponents
};

}  // extern "C"

namespace {

// f of the lanes of a vector, in a fixed order
template <class F>
float folded(Vec v, F f) {
  float part[LANES];
  store(part, v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) part[i] = f(part[i], part[i + width]);
  return part[0];
}

inline float sum(Vec v) { return folded(v, [](float a, float b) { return a + b; }); }
inline float largest(Vec v) { return folded(v, [](float a, float b) { return a > b ? a : b; }); }

// One thread's buffers, kept from call to call; the padding of what is copied was zeroed when the sizes last changed.
struct Room {
  int64_t D = -1, M = -1;
  float* block = nullptr;

  ~Room() { std::free(block); }

  float* fit(int64_t d, int64_t m, int64_t floats) {
    if (d == D && m == M) return block;
    D = d, M = m;
    std::free(block);
    block = static_cast<float*>(std::aligned_alloc(64, up(floats * 4, 64)));
    if (!block) std::abort();
    std::memset(block, 0, floats * 4);
    return block;
  }
};

thread_local Room room;

struct Tokens {
  const Features& c;
  int64_t D, M, padded, wide, head = -1;
  float *x, *y, *gain, *copies;
  const float *weight, *gain_weight, *bias, *gain_bias;

  explicit Tokens(const Features& c) : c(c), D(c.x.width), M(c.columns), padded(up(M, LANES)), wide(up(D, LANES)) {
    x = room.fit(D, M, BLOCK * (wide + 3 * padded) + 2 * D * padded + 2 * padded);
    y = x + BLOCK * wide;
    gain = y + 2 * BLOCK * padded;
    copies = gain + BLOCK * padded;
  }

  // A head's rows of a parameter, in whole vectors: where they lie, or copied
  const float* rows_of(const float* from, int64_t rows, float* to) {
    if (!from) return nullptr;
    from += head * rows * M;
    if (M == padded) return from;
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * padded, from + r * M, M * 4);
    return to;
  }

  void of_head(int64_t h) {
    if (h == head) return;
    head = h;
    weight = rows_of(c.weight, D, copies);
    gain_weight = rows_of(c.gain_weight, D, copies + D * padded);
    bias = rows_of(c.bias, 1, copies + 2 * D * padded);
    gain_bias = rows_of(c.gain_bias, 1, copies + (2 * D + 1) * padded);
  }

  // v with `other` in the lanes beyond the last column
  Vec within(Vec v, int64_t column, float other) const {
    return lane_numbers() + int32_t(column) < int32_t(M) ? v : all(other);
  }

  // softmax(y) ⊕ softmax(−y)
  void hedgehog(const float* row, float* to) const {
    Vec high = all(-INFINITY), low = all(-INFINITY), total{}, opposite{};
    for (int64_t i = 0; i < padded; i += LANES) {
      const Vec v = load(row + i);
      high = larger(within(v, i, -INFINITY), high);
      low = larger(within(-v, i, -INFINITY), low);
    }
    const float top = largest(high), bottom = largest(low);
    float *first = gain, *second = gain + padded;  // room of another kind
    for (int64_t i = 0; i < padded; i += LANES) {
      const Vec v = load(row + i), a = within(exponential(v - top), i, 0), b = within(exponential(-v - bottom), i, 0);
      store(first + i, a);
      store(second + i, b);
      total += a;
      opposite += b;
    }
    const float by = 1 / sum(total), other = 1 / sum(opposite);
    for (int64_t i = 0; i < M; ++i) to[i] = first[i] * by;
    for (int64_t i = 0; i < M; ++i) to[M + i] = second[i] * other;
  }

  // e^{min(y + bias, largest)}
  void exponentials(float* row, float* to) const {
    for (int64_t i = 0; i < padded; i += LANES) {
      const Vec v = load(row + i) + load(bias + i);
      store(row + i, exponential(v > c.largest ? all(c.largest) : v));
    }
    std::memcpy(to, row, M * 4);
  }

  // e^{min(log softmax(y + bias) + gain + gain_bias, largest)}
  void landmark(float* row, const float* gains, float* to) const {
    Vec high = all(-INFINITY), total{};
    for (int64_t i = 0; i < padded; i += LANES) {
      const Vec v = load(row + i) + load(bias + i);
      store(row + i, v);
      high = larger(within(v, i, -INFINITY), high);
    }
    const float top = largest(high);
    for (int64_t i = 0; i < padded; i += LANES) total += within(exponential(load(row + i) - top), i, 0);
    const float log_sum = std::log(sum(total));
    for (int64_t i = 0; i < padded; i += LANES) {
      const Vec v = (load(row + i) - top) - log_sum + (load(gains + i) + load(gain_bias + i));
      store(row + i, exponential(v > c.largest ? all(c.largest) : v));
    }
    std::memcpy(to, row, M * 4);
  }

  void run(int64_t batch, int64_t h, int64_t begin, int64_t n) {
    of_head(h);
    const int64_t width = c.kind == ELU ? D : c.kind == HEDGEHOG ? 2 * M : M;
    float* out = c.out + ((batch * c.x.heads + h) * c.length + begin) * width;
    for (int64_t r = 0; r < n; ++r) {
      widen(c.x, at(c.x, batch, h, c.x.heads, begin + r), x + r * wide);
      for (int64_t i = 0; i < wide; ++i) x[r * wide + i] *= c.scale;
    }
    if (c.kind == ELU) {
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t i = 0; i < wide; i += LANES) {  // elu(x) + 1 = e^x below 0
          const Vec v = load(x + r * wide + i);
          store(x + r * wide + i, v > 0.0f ? v + 1.0f : exponential(v));
        }
        std::memcpy(out + r * D, x + r * wide, D * 4);
      }
      return;
    }
    const int64_t rows = n == 1 ? 1 : up(n, TILE_ROWS);
    product(x, wide, 1, weight, padded, y, padded, rows, padded, D, false);
    if (c.kind == LANDMARK) product(x, wide, 1, gain_weight, padded, gain, padded, rows, padded, D, false);
    for (int64_t r = 0; r < n; ++r) {
      float *row = y + r * padded, *to = out + r * width;
      if (c.kind == HEDGEHOG) hedgehog(row, to);
      else if (c.kind == EXP) exponentials(row, to);
      else landmark(row, gain + r * padded, to);
    }
  }
};

}  // namespace

extern "C" void attention_features(const Features* call) {
  const Features& c = *call;
  const int64_t blocks = (c.length + BLOCK - 1) / BLOCK, heads = c.batch * c.x.heads, units = heads * blocks;
  if (!units) return;
  advise(c.out, heads * c.length * (c.kind == ELU ? c.x.width : c.kind == HEDGEHOG ? 2 * c.columns : c.columns));
#pragma omp parallel num_threads(std::min(c.threads, units))
  {
    Tokens tokens(c);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t owner = unit / blocks, begin = unit % blocks * BLOCK;
      tokens.run(owner / c.x.heads, owner % c.x.heads, begin, std::min(BLOCK, c.length - begin));
    }
  }
}
