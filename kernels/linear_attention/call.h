// SPDX-License-Identifier: Apache-2.0
//
// A call of `attention.cpp`: what is given, where there are tokens, and what is left behind for the next call.
#pragma once

#include "blocks.h"

// -- what Python hands over; `native.py` has the same structures ----------------------------------------------------

extern "C" {

struct Call {
  Rows q, k, v, q_map, k_map;      // the new tokens
  Rows past_k, past_v, past_map;   // `before` positions before them
  const uint8_t *keep, *past_keep;  // [batch, time]; null: no padding
  const float *gate, *map_scale;   // [heads]; null: 1
  const float* decay;              // log decays by position, the past's first; null: none
  int64_t decay_batch, decay_head, decay_row;
  const float *state, *normaliser;  // [batch, states, F, Dv], [batch, states, F]; null: zeros
  float *out, *state_out, *normaliser_out;  // out [batch, heads, time, Dv]
  void *k_left, *v_left, *map_left;         // the last window − 1 positions, dtypes as they came; null: not wanted
  uint8_t* keep_left;
  int64_t batch, heads, states, length, before, window, absolute, normalise, threads;
  float scale, map_factor;         // of the scores; of the features of every query
};

}  // extern "C"

namespace {

// Whether there is a token at a position; the past's come first
bool kept(const Call& c, int64_t batch, int64_t position) {
  if (position < 0) return false;
  if (position < c.before) return !c.past_keep || c.past_keep[batch * c.before + position];
  return !c.keep || c.keep[batch * c.length + position - c.before];
}

// The last window − 1 positions of one head, zeros where there is none
void leave(const Call& c, int64_t batch, int64_t head, const Rows& now, const Rows& past, void* left, bool dense) {
  const int64_t slots = c.window - 1, size = now.type == 0 ? 4 : 2, bytes = now.width * size;
  char* to = static_cast<char*>(left) + (batch * now.heads + head) * slots * bytes;
  int64_t slot = 0;
  if (dense && past.row == past.width) {  // every position is there and the past's lie side by side
    slot = std::max<int64_t>(slots - c.length, 0);
    if (slot) std::memcpy(to, at(past, batch, head, now.heads, c.before + c.length - slots), slot * bytes);
    to += slot * bytes;
  }
  for (; slot < slots; ++slot, to += bytes) {
    const int64_t position = c.before + c.length - slots + slot;
    if (!kept(c, batch, position)) std::memset(to, 0, bytes);
    else if (position < c.before) std::memcpy(to, at(past, batch, head, now.heads, position), bytes);
    else std::memcpy(to, at(now, batch, head, now.heads, position - c.before), bytes);
  }
}

void leave_all(const Call& c) {
  const int64_t slots = c.window - 1, first = c.before + c.length - slots;
  for (int64_t batch = 0; batch < c.batch; ++batch) {
    uint8_t* flags = c.keep_left + batch * slots;
    bool dense = true;
    for (int64_t slot = 0; slot < slots; ++slot) dense &= flags[slot] = kept(c, batch, first + slot);
    for (int64_t h = 0; h < c.k.heads; ++h) leave(c, batch, h, c.k, c.past_k, c.k_left, dense);
    for (int64_t h = 0; h < c.v.heads; ++h) leave(c, batch, h, c.v, c.past_v, c.v_left, dense);
    for (int64_t h = 0; c.map_left && h < c.k_map.heads; ++h)
      leave(c, batch, h, c.k_map, c.past_map, c.map_left, dense);
  }
}

}  // namespace
