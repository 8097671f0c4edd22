// SPDX-License-Identifier: Apache-2.0
//
// Softmax over a window and a linear state before it, in blocks of queries that stay in the processor's caches.
//
//   o_i = (Σ_{i−w < j ≤ i} γ e^{s_ij − c_i} v_j + a_i Σ_{j ≤ i−w} e^{b_i − b_j} φ_q(q_i)·φ_k(k_j) v_j) / (the same without v)
//
// With w = 0 this is linear attention, without features window softmax. `hybrid.py` says what the symbols mean.
//
// For a block of n queries from position s, keys before s − w + 1 are in the state M = Σ φ_k(k) vᵀ; those from there to
// the block's end, w − 1 + n "rows", are compared one by one:
//
//   scores[row][query] = K Qᵀ and Φ_K Φ_Qᵀ    (queries across vector lanes: maxima and sums need no horizontal step)
//   O = a ⊙ Φ_Q M + weightsᵀ V,    M ← e^{b} M + Φ_Kᵀ V over the n rows that leave the window
//
// Every product has the form C[m][n] = Σ_k A(m, k) B[k][n] with B's rows contiguous, so one tile serves all of them.
// Inputs are copied row by row into zero-padded buffers: any strides, three dtypes, padding and cached keys cost nothing
// more, and nothing beyond a row's end is ever read. A state head is one thread's work from the first to the last
// position, so that results do not depend on the number of threads.

#include "call.h"
#include "step.h"

namespace {

// One thread's buffers, kept from call to call: a single token's work is less than that of the first touch of new memory.
// Widths are padded to vectors, rows to tiles; what no input fills was zeroed when the sizes last changed, and stays so.
struct Scratch {
  int64_t D = -1, F = -1, V = -1, rows = -1;
  float *keys, *values, *features, *queries, *query_map, *turned, *scores, *linear, *memory, *sum, *out;
  float *running, *running_low;
  uint8_t* visible;
  float* block = nullptr;

  ~Scratch() { std::free(block); }

  // Sets the pointers, from `block` on; returns how many floats they need.
  int64_t lay_out() {
    int64_t used = 0;
    const auto place = [&](float*& p, int64_t n) {
      if (block) p = block + used;
      used += up(n, 16);
    };
    float* flags = nullptr;
    place(keys, rows * D);
    place(values, rows * V);
    place(features, BLOCK * F);
    place(queries, D * BLOCK);
    place(query_map, F * BLOCK);
    place(turned, std::max(D, F) * BLOCK);
    place(scores, rows * BLOCK);
    place(linear, rows * BLOCK);
    place(memory, F * V);
    place(sum, F);
    place(out, BLOCK * V);
    place(running, rows);
    place(running_low, rows);
    place(flags, rows / 4);
    visible = reinterpret_cast<uint8_t*>(flags);
    return used;
  }

  void fit(const Call& c) {
    const int64_t d = c.window ? up(c.q.width, LANES) : 0, f = up(c.q_map.width, LANES), v = up(c.v.width, LANES);
    const int64_t r = up(std::max<int64_t>(c.window - 1, 0) + BLOCK, 64);
    if (d == D && f == F && v == V && r == rows) return;
    D = d, F = f, V = v, rows = r;
    std::free(block);
    block = nullptr;
    const int64_t bytes = up(lay_out() * 4, 64);
    block = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (!block) std::abort();
    std::memset(block, 0, bytes);
    lay_out();
  }
};

thread_local Scratch scratch;

struct Head {
  const Call& c;
  Scratch& s;
  int64_t batch, state, reach;  // reach: rows before a block's own

  // Rows of the block: positions first, first + 1, …; zeros where there is padding or nothing
  void gather(const Rows& now, const Rows& past, int64_t first, int64_t count, float* to, int64_t width) {
    for (int64_t l = 0; l < count; ++l) {
      const int64_t position = first + l;
      if (!s.visible[l]) std::memset(to + l * width, 0, width * 4);
      else if (position < c.before) widen(past, at(past, batch, state, c.states, position), to + l * width);
      else widen(now, at(now, batch, state, c.states, position - c.before), to + l * width);
    }
  }

  // to[feature][query] = factor · x[query][feature]; queries beyond the block are zero
  void turn(const Rows& x, int64_t head, int64_t begin, int64_t n, int64_t width, float factor, float* to) {
    const int64_t lanes = up(n, LANES);
    for (int64_t r = 0; r < lanes; ++r) {
      float* row = s.turned + r * width;
      if (r >= n) {
        std::memset(row, 0, width * 4);
        continue;
      }
      widen(x, at(x, batch, head, c.heads, begin + r), row);
      for (int64_t i = 0; i < x.width; ++i) row[i] *= factor;
      for (int64_t i = x.width; i < width; ++i) row[i] = 0;
    }
    for (int64_t r = 0; r < lanes; r += LANES) transpose(s.turned + r * width, width, to + r, BLOCK, width);
  }

  // The weights of LANES queries, in place of their scores; their sum and the factor of what the state gives them.
  void weigh(int64_t from, int64_t rows, float gate, float* total, float* of_state) {
    const int64_t w = c.window;
    const int64_t far = s.F ? std::min(rows, from + LANES + reach - w) : 0;  // rows that any of them sees as linear
    const Ints query = lane_numbers() + int32_t(from);
    const Ints newest = query + int32_t(reach), oldest = newest - int32_t(w) + 1;  // rows in each query's window
    Vec mass{}, decayed = all(1.0f), here{}, low{};
    if (s.F) {
      for (int64_t f = 0; f < s.F; ++f) mass += load(s.query_map + f * BLOCK + from) * s.sum[f];
      if (c.decay) {
        here = load(s.running + reach + from), low = load(s.running_low + reach + from);
        decayed = exponential(here + low);
        mass *= decayed;
      }
      for (int64_t l = 0; l < far; ++l) {
        Vec x = load(s.linear + l * BLOCK + from);
        if (c.decay) x *= exponential((here - s.running[l]) + (low - s.running_low[l]));
        x = oldest > int32_t(l) ? x : Vec{};
        mass += x;
        store(s.linear + l * BLOCK + from, x);
      }
    }
    const int64_t begin = w ? std::max<int64_t>(from + reach - w + 1, 0) : rows;
    const int64_t end = std::min(rows, from + LANES + reach);
    Vec top = all(-INFINITY), soft{}, factor = all(1.0f);
    for (int64_t l = begin; l < end; ++l) {
      if (!s.visible[l]) continue;
      const Ints seen = (oldest <= int32_t(l)) & (newest >= int32_t(l));
      top = larger(seen ? load(s.scores + l * BLOCK + from) : all(-INFINITY), top);
    }
    if (w && c.absolute && s.F) {
      for (int i = 0; i < LANES; ++i) top[i] = std::max(top[i], std::log(std::max(mass[i], 0.0f)));
    }
    top = top == -INFINITY ? Vec{} : top;
    if (w && c.absolute) {
      Vec x = -top;
      factor = exponential(x > 80.0f ? all(80.0f) : x);
    }
    for (int64_t l = 0; l < begin && l < far; ++l)
      store(s.scores + l * BLOCK + from, factor * load(s.linear + l * BLOCK + from));
    for (int64_t l = begin; l < end; ++l) {
      const Ints seen = (oldest <= int32_t(l)) & (newest >= int32_t(l));
      Vec x{};
      if (s.visible[l]) x = seen ? exponential(load(s.scores + l * BLOCK + from) - top) * gate : Vec{};
      soft += x;
      if (s.F && l < far) x += factor * load(s.linear + l * BLOCK + from);
      store(s.scores + l * BLOCK + from, x);
    }
    store(total, soft + factor * mass);
    store(of_state, factor * decayed);
  }

  // One head of queries against the block's rows
  void attend(int64_t head, int64_t begin, int64_t n, int64_t rows) {
    const int64_t w = c.window, lanes = up(n, LANES);
    if (w) turn(c.q, head, begin, n, s.D, c.scale, s.queries);
    if (s.F) turn(c.q_map, head, begin, n, s.F, c.map_factor * (c.map_scale ? c.map_scale[head] : 1), s.query_map);
    for (int64_t from = 0; from < lanes; from += 2 * LANES) {
      const int64_t wide = std::min<int64_t>(2 * LANES, lanes - from);
      const int64_t end = std::min(rows, from + wide + reach);
      if (w) {
        const int64_t first = std::max<int64_t>(from + reach - w + 1, 0) / TILE_ROWS * TILE_ROWS;
        product(s.keys + first * s.D, s.D, 1, s.queries + from, BLOCK, s.scores + first * BLOCK + from, BLOCK,
                up(end - first, TILE_ROWS), wide, c.q.width, false);
      }
      const int64_t far = std::min(rows, from + wide + reach - w);
      if (s.F && far > 0)
        product(s.features, s.F, 1, s.query_map + from, BLOCK, s.linear + from, BLOCK, up(far, TILE_ROWS), wide,
                c.q_map.width, false);
    }
    alignas(64) float total[BLOCK], of_state[BLOCK];
    const float gate = c.gate ? c.gate[head] : 1;
    for (int64_t from = 0; from < lanes; from += LANES) weigh(from, rows, gate, total + from, of_state + from);

    for (int64_t from = 0; from < lanes; from += LANES) {
      const int64_t end = std::min(rows, from + LANES + reach);
      const int64_t first = s.F ? 0 : std::max<int64_t>(from + reach - w + 1, 0);
      const int64_t some = std::min<int64_t>(LANES, up(n - from, TILE_ROWS));
      float* to = s.out + from * s.V;
      if (s.F) {
        product(s.query_map + from, 1, BLOCK, s.memory, s.V, to, s.V, some, s.V, c.q_map.width, false);
        for (int64_t r = 0; r < some; ++r)
          for (int64_t i = 0; i < s.V; i += LANES) store(to + r * s.V + i, load(to + r * s.V + i) * of_state[from + r]);
      }
      product(s.scores + first * BLOCK + from, 1, BLOCK, s.values + first * s.V, s.V, to, s.V, some, s.V, end - first,
              s.F > 0);
    }
    for (int64_t r = 0; r < n; ++r) {
      float* to = c.out + ((batch * c.heads + head) * c.length + begin + r) * c.v.width;
      const float divisor = c.normalise && total[r] != 0 ? total[r] : 1;
      for (int64_t i = 0; i < c.v.width; ++i) to[i] = s.out[r * s.V + i] / divisor;
    }
  }

  // M ← e^{b_{n−1}} M + Σ_{l < n} e^{b_{n−1} − b_l} φ_l v_lᵀ: the rows that leave the window with this block
  void take_up(int64_t n) {
    if (c.decay) {
      const float last = s.running[n - 1], low = s.running_low[n - 1], kept = std::exp(last + low);
      for (int64_t i = 0; i < s.F * s.V; ++i) s.memory[i] *= kept;
      for (int64_t f = 0; f < s.F; ++f) s.sum[f] *= kept;
      for (int64_t l = 0; l < n; ++l) {
        const float factor = std::exp((last - s.running[l]) + (low - s.running_low[l]));
        for (int64_t f = 0; f < s.F; ++f) s.features[l * s.F + f] *= factor;
      }
    }
    product(s.features, 1, s.F, s.values, s.V, s.memory, s.V, s.F, s.V, n, true);
    for (int64_t f = 0; f < s.F; f += LANES) {
      Vec sum{};
      for (int64_t l = 0; l < n; ++l) sum += load(s.features + l * s.F + f);
      store(s.sum + f, load(s.sum + f) + sum);
    }
  }

  void run(int64_t first_head, int64_t last_head, bool writes) {
    const int64_t width = c.v.width, F = c.q_map.width, index = batch * c.states + state;
    if (s.F) {
      std::memset(s.memory, 0, s.F * s.V * 4);
      std::memset(s.sum, 0, s.F * 4);
      if (c.state) {
        for (int64_t f = 0; f < F; ++f) std::memcpy(s.memory + f * s.V, c.state + (index * F + f) * width, width * 4);
        std::memcpy(s.sum, c.normaliser + index * F, F * 4);
      }
    }
    for (int64_t begin = 0; begin < c.length; begin += BLOCK) {
      const int64_t n = std::min(BLOCK, c.length - begin), rows = reach + n, first = c.before + begin - reach;
      for (int64_t l = 0; l < rows; ++l) s.visible[l] = kept(c, batch, first + l);
      gather(c.v, c.past_v, first, rows, s.values, s.V);
      if (c.window) gather(c.k, c.past_k, first, rows, s.keys, s.D);
      if (s.F) gather(c.k_map, c.past_map, first, n, s.features, s.F);
      if (c.decay) {
        const float* decay = c.decay + batch * c.decay_batch + state * c.decay_head;
        double sum = 0;  // kept in two floats: differences of long sums must be as good as short sums
        for (int64_t l = 0; l < rows; ++l) {
          sum += first + l < 0 ? 0 : decay[(first + l) * c.decay_row];
          s.running[l] = float(sum);
          s.running_low[l] = float(sum - s.running[l]);
        }
      }
      for (int64_t head = first_head; head < last_head; ++head) attend(head, begin, n, rows);
      if (s.F) take_up(n);
    }
    if (!s.F || !writes || !c.state_out) return;
    for (int64_t f = 0; f < F; ++f) std::memcpy(c.state_out + (index * F + f) * width, s.memory + f * s.V, width * 4);
    std::memcpy(c.normaliser_out + index * F, s.sum, F * 4);
  }
};

}  // namespace

// Fewer states than threads: each head of queries keeps a copy of its state, and the first of a group writes it.
extern "C" void windowed_linear_attention(const Call* call) {
  const Call& c = *call;
  const int64_t group = c.heads / c.states, split = c.batch * c.states < c.threads ? group : 1;
  const int64_t units = c.batch * c.states * split, each = group / split;
  if (!units) return;
  advise(c.out, c.batch * c.heads * c.length * c.v.width);
  const bool one = c.length == 1 && Step::fits(c);
#pragma omp parallel num_threads(std::min(c.threads, units))
  {
    if (!one) scratch.fit(c);
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t owner = unit / split, part = unit % split, batch = owner / c.states, state = owner % c.states;
      const int64_t first = state * group + part * each;
      if (one) Step{c, batch, state}.run(first, first + each, part == 0);
      else Head{c, scratch, batch, state, std::max<int64_t>(c.window - 1, 0)}.run(first, first + each, part == 0);
    }
  }
  if (c.keep_left) leave_all(c);
}
