// SPDX-License-Identifier: Apache-2.0
// y = x Wᵀ + b with W decoded on the way, for any kind of packed weight.
//
// The columns are taken in blocks of 128. Which weight lies in which lane is the kind's choice; activations are brought
// to that order once per call, so the weights never are. A kind says how it decodes:
//
//     void open(Row&, long row, long first, long last)      what blocks first .. last - 1 of a row need
//     void read<WHOLE>(Quad&, const Row&, long block)       what up to four blocks share
//     long whole(const Row&)                                the first block that WHOLE quads do not reach
//     void step(Block&, const Quad&, const Row&, long block, int q)   one of these blocks
//     Floats weight(const Block&, int k)                    its k-th vector of 16
//     static int place(int k, int l)                        the position in the block of lane l of vector k
//
// and, if DIRECT, the same in bfloat16: `Shorts narrow(const Block&, int k)` and `place_narrow`.
//
// One row of x is bound by the bytes of W: weights are multiplied from registers. More rows share the decoding: a
// panel of rows of W is decoded, some columns at a time, to memory of the first cache, and multiplied from there.
#pragma once

#include "lanes.h"

constexpr long BLOCK = 128;
constexpr long SEGMENT = 32;  // blocks opened at a time: bounds what a Row holds
constexpr int PANEL = 8;      // rows of W decoded to memory at a time
constexpr int TILE = 4;       // rows of W, and of x, whose products are summed in registers
constexpr long ROWS = 32;     // rows of x that a panel is decoded for: bounds the sums it keeps

// ------------------------------------------------------------------------------------ how weights are multiplied

// In float32.
template <class Kind>
struct Wide {
    typedef Floats Vector;
    typedef float Stored;
    static constexpr int VECTORS = BLOCK / 16, WIDTH = 16;
    static constexpr long CHUNK = 4;  // blocks of a panel decoded at a time: 16 KiB

    static constexpr int place(int k, int l) { return Kind::place(k, l); }
    static Vector weight(const Kind& kind, const typename Kind::Block& part, int k) { return kind.weight(part, k); }
    static Floats add(Floats sum, Vector w, Vector x) { return sum + w * x; }
    static void keep(float* to, Floats v) { store(to, v); }
};

// In bfloat16, products summed in float32: what eager does with bfloat16 activations, whose weights it rounds.
template <class Kind>
struct Narrow {
    typedef Shorts Vector;
    typedef uint16_t Stored;
    static constexpr int VECTORS = BLOCK / 32, WIDTH = 32;
    static constexpr long CHUNK = 8;

    static constexpr int place(int k, int l) {
        if constexpr (Kind::DIRECT) return Kind::place_narrow(k, l);
        return Kind::place(2 * k + l / 16, l % 16);
    }
    static Vector weight(const Kind& kind, const typename Kind::Block& part, int k) {
        if constexpr (Kind::DIRECT) return kind.narrow(part, k);
        return narrowed(kind.weight(part, 2 * k), kind.weight(part, 2 * k + 1));
    }
#if DOT_PRODUCTS
    static Floats add(Floats sum, Vector w, Vector x) { return dot(sum, w, x); }
#endif
    static void keep(uint16_t* to, Floats v) {
        const Shorts both = narrowed(v, v);
        memcpy(to, &both, 32);
    }
};

// use(part, block) for blocks first .. last - 1 of an opened row, four at a time.
template <class Kind, class Use>
static inline void each_block(const Kind& kind, const typename Kind::Row& row, long first, long last, const Use& use) {
    const long whole = kind.whole(row) < last ? kind.whole(row) : last;
    long block = first;
    for (; block + 4 <= whole; block += 4) {
        typename Kind::Quad quad;
        kind.template read<true>(quad, row, block);
        UNROLLED
        for (int q = 0; q < 4; q++) {
            typename Kind::Block part;
            kind.step(part, quad, row, block + q, q);
            use(part, block + q);
        }
    }
    if (block == last) return;
    typename Kind::Quad quad;
    kind.template read<false>(quad, row, block);
    for (int q = 0; block + q < last; q++) {
        typename Kind::Block part;
        kind.step(part, quad, row, block + q, q);
        use(part, block + q);
    }
}

// All vectors of a block at once: of one instruction several in a row keep more of the processor's pipes busy.
template <class Form, class Kind>
static inline void weights(
    typename Form::Vector to[Form::VECTORS], const Kind& kind, const typename Kind::Block& part) {
    UNROLLED
    for (int k = 0; k < Form::VECTORS; k++) to[k] = Form::weight(kind, part, k);
}

// ------------------------------------------------------------------------------------ a call

// As `products.py` packs it: eight bytes each.
struct Call {
    const void *first, *scale, *third, *fourth;  // the weight's tensors; what they are is the kind's business
    int64_t scale_type, out, in, group;
    const void *x, *bias;  // [batch, in]; [out], or null
    void *y, *scratch;     // [batch, out]; x in the order of lanes, batch * blocks * 128 floats
    int64_t type, bias_type, batch, threads;

    long blocks() const { return (in + BLOCK - 1) / BLOCK; }
};

// x in the order of lanes, padded with zeros: [chunks, batch, blocks of a chunk, 128].
template <class Form>
static void ordered(const Call& call, long chunk) {
    typedef typename Form::Stored Stored;
    const long blocks = call.blocks(), batch = call.batch;
    spread(batch, 1, batch * call.in < 65536 ? 1 : call.threads, [=, &call](long first, long last) {
        for (long row = first; row < last; row++)
            for (long block = 0; block < blocks; block++) {
                Stored part[BLOCK] = {};
                const long rest = call.in - block * BLOCK, from = row * call.in + block * BLOCK;
                for (long at = 0; at < BLOCK && at < rest; at += 16) {
                    const long count = rest - at < 16 ? rest - at : 16;
                    Form::keep(part + at, load_floats(call.x, (Type)call.type, from + at, count));
                }
                const long start = block / chunk * chunk, some = blocks - start < chunk ? blocks - start : chunk;
                Stored* to = (Stored*)call.scratch + (start * batch + row * some + block - start) * BLOCK;
                for (int k = 0; k < Form::VECTORS; k++)
                    for (int l = 0; l < Form::WIDTH; l++) to[k * Form::WIDTH + l] = part[Form::place(k, l)];
            }
    });
}

// ------------------------------------------------------------------------------------ one row of x

static inline void finish(const Call& call, long at, long row, float whole) {
    if (call.bias) whole += load_floats(call.bias, (Type)call.bias_type, row, 1)[0];
    if (call.type == BFLOAT16) {
        const Shorts narrow = narrowed(all(whole), all(whole));
        memcpy((uint16_t*)call.y + at * call.out + row, &narrow, sizeof(uint16_t));
    } else {
        ((float*)call.y)[at * call.out + row] = whole;
    }
}

// Blocks first .. last - 1 of an opened row with one row of x. Not inlined: there its loop keeps its registers.
template <class Form, class Kind>
__attribute__((noinline)) static Floats product(
    const Kind kind, const typename Kind::Row& row, const typename Form::Stored* x, long first, long last) {
    typedef typename Form::Vector Vector;
    constexpr int SUMS = 4;  // a sum waits some cycles for its last product
    Floats total[SUMS] = {};
    each_block(kind, row, first, last, [&](const typename Kind::Block& part, long block) {
        Vector weight[Form::VECTORS];
        weights<Form>(weight, kind, part);
        UNROLLED
        for (int k = 0; k < Form::VECTORS; k++)
            total[k % SUMS] = Form::add(total[k % SUMS], weight[k], load<Vector>(x + block * BLOCK + k * Form::WIDTH));
    });
    return (total[0] + total[1]) + (total[2] + total[3]);
}

// Rows first .. last - 1 of W. Each row is opened while the one before is multiplied: what opening stores would be
// read too soon after, and a processor waits for such a store to leave the pipeline.
template <class Form, class Kind>
static void rows_of(const Kind& kind, const Call& call, long first, long last) {
    const long blocks = call.blocks();
    const auto* x = (const typename Form::Stored*)call.scratch;
    typename Kind::Row state[2];
    const auto until = [=](long from) { return from + SEGMENT < blocks ? from + SEGMENT : blocks; };
    kind.open(state[0], first, 0, until(0));
    int turn = 0;
    for (long row = first; row < last; row++) {
        Floats total{};
        for (long from = 0; from < blocks; from += SEGMENT, turn ^= 1) {
            if (from + SEGMENT < blocks)
                kind.open(state[turn ^ 1], row, from + SEGMENT, until(from + SEGMENT));
            else if (row + 1 < last)
                kind.open(state[turn ^ 1], row + 1, 0, until(0));
            total += product<Form>(kind, state[turn], x, from, until(from));
        }
        finish(call, 0, row, sum(total));
    }
}

// ------------------------------------------------------------------------------------ more

// sums[r][t] += w[r] · x[t] over `count` vectors; rows of w lie `wide` elements apart, rows of x `far`.
template <class Form, int T>
static inline void tile(
    const typename Form::Stored* w, long wide, const typename Form::Stored* x, long far, Floats* sums, long next,
    long count) {
    typedef typename Form::Vector Vector;
    Floats total[TILE][T];
    UNROLLED
    for (int r = 0; r < TILE; r++) {
        UNROLLED
        for (int t = 0; t < T; t++) total[r][t] = sums[r * next + t];
    }
    for (long k = 0; k < count; k++) {
        Vector weight[TILE];
        UNROLLED
        for (int r = 0; r < TILE; r++) weight[r] = load<Vector>(w + r * wide + k * Form::WIDTH);
        UNROLLED
        for (int t = 0; t < T; t++) {
            Vector value = load<Vector>(x + t * far + k * Form::WIDTH);
            hold(value);
            UNROLLED
            for (int r = 0; r < TILE; r++) total[r][t] = Form::add(total[r][t], weight[r], value);
        }
    }
    UNROLLED
    for (int r = 0; r < TILE; r++) {
        UNROLLED
        for (int t = 0; t < T; t++) sums[r * next + t] = total[r][t];
    }
}

// Blocks first .. last - 1 of an opened row, in the order of lanes.
template <class Form, class Kind>
static inline void decode_blocks(
    const Kind& kind, const typename Kind::Row& row, long first, long last, typename Form::Stored* to) {
    each_block(kind, row, first, last, [&](const typename Kind::Block& part, long block) {
        typename Form::Vector weight[Form::VECTORS];
        weights<Form>(weight, kind, part);
        UNROLLED
        for (int k = 0; k < Form::VECTORS; k++) store(to + (block - first) * BLOCK + k * Form::WIDTH, weight[k]);
    });
}

// Rows of W from `row` on, at most PANEL, with rows of x from `begin` on, at most ROWS.
template <class Form, class Kind>
static inline void panel_of(const Kind& kind, const Call& call, long row, long begin) {
    typedef typename Form::Stored Stored;
    const long blocks = call.blocks(), batch = call.batch - begin < ROWS ? call.batch - begin : ROWS;
    const int count = call.out - row < PANEL ? call.out - row : PANEL;
    typename Kind::Row state[PANEL];
    alignas(64) Stored decoded[PANEL][Form::CHUNK * BLOCK];
    alignas(64) Floats sums[PANEL][ROWS];
    memset(sums, 0, sizeof sums);
    for (long start = 0; start < blocks; start += Form::CHUNK) {
        const long end = start + Form::CHUNK < blocks ? start + Form::CHUNK : blocks, some = end - start;
        if (start % SEGMENT == 0)
            for (int r = 0; r < count; r++)
                kind.open(state[r], row + r, start, start + SEGMENT < blocks ? start + SEGMENT : blocks);
        for (int r = 0; r < count; r++) decode_blocks<Form>(kind, state[r], start, end, decoded[r]);
        const Stored* x = (const Stored*)call.scratch + (start * call.batch + begin * some) * BLOCK;
        const long far = some * BLOCK, vectors = some * Form::VECTORS;
        for (long t = 0; t < batch; t += TILE)
            for (int r = 0; r < count; r += TILE) {
                const auto multiplied = batch - t >= 4   ? tile<Form, 4>
                                        : batch - t == 3 ? tile<Form, 3>
                                        : batch - t == 2 ? tile<Form, 2>
                                                         : tile<Form, 1>;
                multiplied(decoded[r], Form::CHUNK * BLOCK, x + t * far, far, &sums[r][t], ROWS, vectors);
            }
    }
    for (int r = 0; r < count; r++)
        for (long t = 0; t < batch; t++) finish(call, begin + t, row + r, sum(sums[r][t]));
}

// Pieces of whole panels: small enough to share the work evenly, large enough to read memory in long runs.
static inline long piece(long out, int threads) {
    const long even = out / (4 * threads) / PANEL * PANEL;
    return even < PANEL ? PANEL : even > 256 ? 256 : even;
}

template <class Form, class Kind>
static void multiply_as(const Kind& kind, const Call& call) {
    ordered<Form>(call, Form::CHUNK);
    spread(call.out, piece(call.out, call.threads), call.threads, [&](long first, long last) {
        if (call.batch == 1) {
            rows_of<Form>(kind, call, first, last);
            return;
        }
        for (long begin = 0; begin < call.batch; begin += ROWS)
            for (long row = first; row < last; row += PANEL) panel_of<Form>(kind, call, row, begin);
    });
}

template <class Kind>
static void multiply_all(const Kind& kind, const Call& call) {
#if DOT_PRODUCTS
    if (call.type == BFLOAT16) return multiply_as<Narrow<Kind>>(kind, call);
#endif
    multiply_as<Wide<Kind>>(kind, call);
}

// ------------------------------------------------------------------------------------ dense

// Rows begin .. end - 1 of W, [rows, blocks * 128], in the order of lanes.
template <class Form, class Kind>
static void decode_as(const Kind& kind, const Call& call, void* to, long begin, long end) {
    const long blocks = call.blocks();
    spread(end - begin, 8, call.threads, [&](long from, long until) {
        typename Kind::Row state;
        for (long row = from; row < until; row++)
            for (long first = 0; first < blocks; first += SEGMENT) {
                const long last = first + SEGMENT < blocks ? first + SEGMENT : blocks;
                kind.open(state, begin + row, first, last);
                decode_blocks<Form>(
                    kind, state, first, last, (typename Form::Stored*)to + (row * blocks + first) * BLOCK);
            }
    });
}

template <class Kind>
static void decode_all(const Kind& kind, const Call& call, void* to, long begin, long end) {
    if (call.type == BFLOAT16) return decode_as<Narrow<Kind>>(kind, call, to, begin, end);
    decode_as<Wide<Kind>>(kind, call, to, begin, end);
}

// x to `scratch`, [batch, blocks * 128], in the order of lanes.
template <class Kind>
static void order_all(const Call& call) {
    if (call.type == BFLOAT16) return ordered<Narrow<Kind>>(call, call.blocks());
    ordered<Wide<Kind>>(call, call.blocks());
}

// Rows of W by index, float32 [batch, in] in the order of columns; x are their numbers, int64. `scratch`, an int64, is
// set if one is no row of W: then nothing is written.
template <class Kind>
static void gather_all(const Kind& kind, const Call& call) {
    const auto* ids = (const int64_t*)call.x;
    for (long i = 0; i < call.batch; i++)
        if (ids[i] < 0 || ids[i] >= call.out) {
            *(int64_t*)call.scratch = 1;
            return;
        }
    const long blocks = call.blocks();
    spread(call.batch, 1, call.threads, [&](long from, long until) {
        typename Kind::Row state;
        for (long i = from; i < until; i++)
            for (long first = 0; first < blocks; first += SEGMENT) {
                const long last = first + SEGMENT < blocks ? first + SEGMENT : blocks;
                kind.open(state, ids[i], first, last);
                each_block(kind, state, first, last, [&](const typename Kind::Block& part, long block) {
                    float lanes[BLOCK], columns[BLOCK];
                    Floats weight[BLOCK / LANES];
                    weights<Wide<Kind>>(weight, kind, part);
                    memcpy(lanes, weight, sizeof lanes);
                    for (int k = 0; k < BLOCK / LANES; k++)
                        for (int l = 0; l < LANES; l++) columns[Kind::place(k, l)] = lanes[k * LANES + l];
                    const long rest = call.in - block * BLOCK;
                    memcpy(
                        (float*)call.y + i * call.in + block * BLOCK, columns,
                        (rest < BLOCK ? rest : BLOCK) * sizeof(float));
                });
            }
    });
}

// What products.py calls: `packed(call)` is the weight.
#define FUNCTIONS(packed)                                                               \
    extern "C" void multiply(const Call* call) {                                        \
        const auto w = packed(*call);                                                   \
        multiply_all(Kind{w}, *call);                                                   \
    }                                                                                   \
    extern "C" void decode(const Call* call, void* to, long begin, long end) {          \
        const auto w = packed(*call);                                                   \
        decode_all(Kind{w}, *call, to, begin, end);                                     \
    }                                                                                   \
    extern "C" void order(const Call* call) { order_all<Kind>(*call); }                 \
    extern "C" void gather(const Call* call) {                                          \
        const auto w = packed(*call);                                                   \
        gather_all(Kind{w}, *call);                                                     \
    }
