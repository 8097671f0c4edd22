// SPDX-License-Identifier: Apache-2.0
//
// One new token: the formula of `attention.cpp` for a single query, without buffers. Every byte is read once where it lies.
//
// All rows of the window are softmax, so that linear terms come from the state alone; without a window the token's own
// key is the one linear row. Sums run across vector lanes, so sizes are whole vectors; others go through blocks of one.
#pragma once

#include "call.h"

namespace {

// The lanes' sum, by halves
inline float across(Vec v) {
  float part[LANES];
  store(part, v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

struct Step {
  const Call& c;
  int64_t batch, state;

  static constexpr int64_t ROWS = 1024, WIDTH = 512;  // of the window, of a row: what stays on the stack

  static bool fits(const Call& c) {
    const auto whole = [](int64_t n) { return n % LANES == 0 && n <= WIDTH; };
    return whole(c.q.width) && whole(c.q_map.width) && whole(c.v.width) && c.window <= ROWS;
  }

  // A row as float32: where it lies, or widened into `room`
  const float* row(const Rows& x, int64_t head, int64_t of, int64_t time, float* room) const {
    const char* from = at(x, batch, head, of, time);
    if (x.type == 0) return reinterpret_cast<const float*>(from);
    widen(x, from, room);
    return room;
  }

  // The row of the state's head at a position; null where there is none
  const float* row_at(const Rows& now, const Rows& past, int64_t position, float* room) const {
    if (!kept(c, batch, position)) return nullptr;
    const bool old = position < c.before;
    return row(old ? past : now, state, c.states, old ? position : position - c.before, room);
  }

  static float dot(const float* a, const float* b, int64_t n) {
    Vec sum{};
    for (int64_t i = 0; i < n; i += LANES) sum += load(a + i) * load(b + i);
    return across(sum);
  }

  // Σ of the log decays of `count` positions up to the token's own
  float decayed(int64_t begin, int64_t end) const {
    double sum = 0;
    const float* decay = c.decay + batch * c.decay_batch + state * c.decay_head;
    for (int64_t position = std::max<int64_t>(begin, 0); position < end; ++position)
      sum += decay[position * c.decay_row];
    return std::exp(float(sum));
  }

  void run(int64_t first_head, int64_t last_head, bool writes) {
    const int64_t F = c.q_map.width, V = c.v.width, oldest = c.before - std::max<int64_t>(c.window - 1, 0);
    const int64_t index = batch * c.states + state;
    const float* memory = c.state ? c.state + index * F * V : nullptr;
    const float* sum = c.normaliser ? c.normaliser + index * F : nullptr;
    const float from_state = F && c.decay ? decayed(oldest, c.before + 1) : 1;
    for (int64_t head = first_head; head < last_head; ++head) attend(head, oldest, memory, sum, from_state);
    if (F && writes && c.state_out) take_up(oldest, memory, sum, F && c.decay ? decayed(oldest, oldest + 1) : 1);
  }

  void attend(int64_t head, int64_t oldest, const float* memory, const float* sum, float from_state) const {
    alignas(64) float weight[ROWS], room[WIDTH], query[WIDTH], mapped[WIDTH];
    const int64_t D = c.q.width, F = c.q_map.width, V = c.v.width, rows = c.before - oldest + 1;
    float mass = 0, own = 0;
    if (F) {
      const float scale = c.map_factor * (c.map_scale ? c.map_scale[head] : 1);
      const float* from = row(c.q_map, head, c.heads, 0, room);
      for (int64_t i = 0; i < F; i += LANES) store(mapped + i, load(from + i) * scale);
      if (sum) mass = dot(mapped, sum, F) * from_state;
      const float* key = c.window ? nullptr : row_at(c.k_map, c.past_map, c.before, room);
      if (key) mass += own = dot(mapped, key, F);
    }
    float top = -INFINITY, factor = 1, soft = 0;
    if (c.window) {
      const float* from = row(c.q, head, c.heads, 0, room);
      for (int64_t i = 0; i < D; i += LANES) store(query + i, load(from + i) * c.scale);
      for (int64_t l = 0; l < rows; ++l) {
        const float* key = row_at(c.k, c.past_k, oldest + l, room);
        weight[l] = key ? dot(query, key, D) : -INFINITY;
        top = weight[l] > top ? weight[l] : top;
      }
      if (c.absolute && F) top = std::max(top, std::log(std::max(mass, 0.0f)));
      top = top == -INFINITY ? 0 : top;
      if (c.absolute) factor = std::exp(std::min(-top, 80.0f));
      const float gate = c.gate ? c.gate[head] : 1;
      for (int64_t l = rows; l < up(rows, LANES); ++l) weight[l] = -INFINITY;
      Vec total{};
      for (int64_t l = 0; l < rows; l += LANES) {
        const Vec x = exponential(load(weight + l) - top) * gate;  // 0 where there is no key
        store(weight + l, x);
        total += x;
      }
      soft = across(total);
    }
    float* out = c.out + (batch * c.heads + head) * V;
    const float total = soft + factor * mass, divisor = c.normalise && total != 0 ? total : 1;
    const float by_state = factor * from_state;
    if (memory) product(mapped, 0, 1, memory, V, out, V, 1, V, F, false);
    for (int64_t i = 0; i < V; i += LANES) store(out + i, memory ? load(out + i) * by_state : Vec{});
    if (!c.window) weight[0] = own;
    for (int64_t l = 0; l < rows; ++l) {
      const float* value = row_at(c.v, c.past_v, oldest + l, room);
      if (!value) continue;
      for (int64_t i = 0; i < V; i += LANES) store(out + i, load(out + i) + weight[l] * load(value + i));
    }
    for (int64_t i = 0; i < V; i += LANES) store(out + i, load(out + i) / divisor);
  }

  // M ← e^{b} M + φ vᵀ of the row that leaves the window
  void take_up(int64_t oldest, const float* memory, const float* sum, float decay) const {
    alignas(64) float key_room[WIDTH], value_room[WIDTH];
    const int64_t F = c.q_map.width, V = c.v.width, index = batch * c.states + state;
    const float* key = row_at(c.k_map, c.past_map, oldest, key_room);
    const float* value = row_at(c.v, c.past_v, oldest, value_room);
    float *to = c.state_out + index * F * V, *sum_to = c.normaliser_out + index * F;
    for (int64_t f = 0; f < F; ++f) {
      const float feature = key ? key[f] : 0;
      for (int64_t i = 0; i < V; i += LANES) {
        Vec x = memory ? load(memory + f * V + i) * decay : Vec{};
        if (value) x += feature * load(value + i);
        store(to + f * V + i, x);
      }
      sum_to[f] = (sum ? sum[f] * decay : 0) + feature;
    }
  }
};

}  // namespace
