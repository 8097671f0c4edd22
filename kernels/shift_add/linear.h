// SPDX-License-Identifier: Apache-2.0
// y = x Wᵀ + b with W decoded in registers, for any kind of packed weight.
//
// The columns are taken in blocks of 128, eight vectors of sixteen. Which weight lies in which lane is the kind's
// choice: `place(k, l)`, its position in the block. Activations are brought to that order once per call, so the
// weights never are. A kind says how it decodes:
//
//     void open(Row&, long row, long first, long last)      what blocks first .. last - 1 of a row need
//     void step(Block&, const Row&, long block)             one block of that row
//     Floats weight(const Block&, int k)                    its k-th vector
//
// A weight is decoded once for a tile of up to eight rows of x; two rows of W share every load of x.
#pragma once

#include "lanes.h"

constexpr long BLOCK = 128, VECTORS = BLOCK / LANES;
constexpr long SEGMENT = 32;  // blocks opened at a time: bounds what a Row holds
constexpr int PAIR = 2;       // rows of W at a time

struct Call {
    const float* x;     // [tiles, blocks, VECTORS, tile, LANES], from `ordered`
    const float* bias;  // [out], or null
    float* y;           // [batch, out]
    long out, in, batch;
    int tile, threads;

    long blocks() const { return (in + BLOCK - 1) / BLOCK; }
    long tiles() const { return (batch + tile - 1) / tile; }
};

// x [batch, in] in the order of lanes, padded with zeros: [tiles, blocks, VECTORS, tile, LANES].
template <class Kind>
static void ordered(const float* x, float* to, long batch, long in, int tile, int threads) {
    const long blocks = (in + BLOCK - 1) / BLOCK, padded = (batch + tile - 1) / tile * tile;
    spread(padded, 1, batch * in < 65536 ? 1 : threads, [=](long first, long last) {
        for (long row = first; row < last; row++) {
            float* tiled = to + (row / tile) * blocks * BLOCK * tile + (row % tile) * LANES;
            for (long block = 0; block < blocks; block++) {
                float part[BLOCK] = {};
                const long rest = in - block * BLOCK, count = rest < BLOCK ? rest : BLOCK;
                if (row < batch) memcpy(part, x + row * in + block * BLOCK, count * sizeof(float));
                for (int k = 0; k < VECTORS; k++)
                    for (int l = 0; l < LANES; l++)
                        tiled[(block * VECTORS + k) * tile * LANES + l] = part[Kind::place(k, l)];
            }
        }
    });
}

template <class Kind, int TILE>
static inline void rows_of(const Kind& kind, const Call& call, long tile, long row) {
    // The second of an odd last pair is the first again: the same value is written twice.
    const long rows[PAIR] = {row, row + 1 < call.out ? row + 1 : row}, blocks = call.blocks();
    const float* x = call.x + tile * TILE * blocks * BLOCK;
    typename Kind::Row state[PAIR];
    // A sum waits four cycles for its last product: a tile of few rows keeps several sums going.
    constexpr int SUMS = TILE == 1 ? 4 : TILE == 2 ? 2 : 1;
    Floats total[PAIR][TILE][SUMS] = {};
    for (long first = 0; first < blocks; first += SEGMENT) {
        const long last = first + SEGMENT < blocks ? first + SEGMENT : blocks;
        for (int r = 0; r < PAIR; r++) kind.open(state[r], rows[r], first, last);
        for (long block = first; block < last; block++) {
            typename Kind::Block parts[PAIR];
            UNROLLED
            for (int r = 0; r < PAIR; r++) kind.step(parts[r], state[r], block);
            UNROLLED
            for (int k = 0; k < VECTORS; k++) {
                Floats weight[PAIR];
                UNROLLED
                for (int r = 0; r < PAIR; r++) weight[r] = kind.weight(parts[r], k);
                const float* at = x + (block * VECTORS + k) * TILE * LANES;
                UNROLLED
                for (int m = 0; m < TILE; m++) {
                    const Floats value = load<Floats>(at + m * LANES);
                    UNROLLED
                    for (int r = 0; r < PAIR; r++) total[r][m][k % SUMS] += weight[r] * value;
                }
            }
        }
    }
    UNROLLED
    for (int r = 0; r < PAIR; r++) {
        const float bias = call.bias ? call.bias[rows[r]] : 0;
        UNROLLED
        for (int m = 0; m < TILE; m++) {
            Floats whole = total[r][m][0];
            UNROLLED
            for (int s = 1; s < SUMS; s++) whole += total[r][m][s];
            const long at = tile * TILE + m;
            if (at < call.batch) call.y[at * call.out + rows[r]] = sum(whole) + bias;
        }
    }
}

// Pieces of an even number of rows: small enough to share the work evenly, large enough to read memory in long runs.
static inline long piece(long out, int threads) {
    const long even = out / (4 * threads) / PAIR * PAIR;
    return even < PAIR ? PAIR : even > 256 ? 256 : even;
}

template <class Kind, int TILE>
static void multiply_tile(const Kind& kind, const Call& call) {
    spread(call.out, piece(call.out, call.threads), call.threads, [&](long first, long last) {
        for (long tile = 0; tile < call.tiles(); tile++)  // the packed rows of a piece stay in cache between tiles
            for (long row = first; row < last; row += PAIR) rows_of<Kind, TILE>(kind, call, tile, row);
    });
}

template <class Kind>
static void multiply_tiles(const Kind& kind, const Call& call) {
    switch (call.tile) {
        case 1: return multiply_tile<Kind, 1>(kind, call);
        case 2: return multiply_tile<Kind, 2>(kind, call);
        case 4: return multiply_tile<Kind, 4>(kind, call);
        default: return multiply_tile<Kind, 8>(kind, call);
    }
}

// Rows first_row .. last_row - 1 of W as [rows, blocks * BLOCK], columns in the order of lanes.
template <class Kind>
static void decode_rows(const Kind& kind, float* to, long first_row, long last_row, long in, int threads) {
    const long blocks = (in + BLOCK - 1) / BLOCK;
    spread(last_row - first_row, 8, threads, [&](long begin, long end) {
        for (long row = begin; row < end; row++) {
            typename Kind::Row state;
            for (long first = 0; first < blocks; first += SEGMENT) {
                const long last = first + SEGMENT < blocks ? first + SEGMENT : blocks;
                kind.open(state, first_row + row, first, last);
                for (long block = first; block < last; block++) {
                    typename Kind::Block part;
                    kind.step(part, state, block);
                    for (int k = 0; k < VECTORS; k++)
                        store(to + (row * blocks + block) * BLOCK + k * LANES, kind.weight(part, k));
                }
            }
        }
    });
}
