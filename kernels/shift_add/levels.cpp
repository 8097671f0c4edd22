// SPDX-License-Identifier: Apache-2.0
// y = x Wᵀ + b,  W[o, i] = scale[o, i / group] · levels[word_i], from the bit stream as it is stored.
//
// Lane l of a block of 128 columns holds columns 8 l to 8 l + 7: their words are BITS whole bytes of the stream. A word
// is then a shift, its value a lookup: in a vector for up to 16 levels, in memory for more. Layouts: codec.py.
#include "linear.h"

// Compiled for one format at a time: BITS 1 to 12; SPAN, what weights share a scale: a block or more (128), the eight
// of a lane (8), or any (1).
constexpr int DWORDS = (BITS + 3) / 4;
constexpr bool SMALL = BITS <= 4;

struct Packed {
    const uint8_t* codes;    // [out, ceil(in * BITS / 8)]
    const void* scale;       // [out, groups]
    const float* levels;     // [2^BITS], repeated to 16 where there are fewer
    const int32_t* group_of; // SPAN 8: [blocks, LANES], SPAN 1: [blocks, VECTORS, LANES]; else null
    Type type;               // of the scales; float32 for SPAN 1
    long out, in, group;
};

struct Kind {
    const Packed& w;
    const long bytes = (w.in * BITS + 7) / 8, whole = bytes / (LANES * BITS), groups = (w.in + w.group - 1) / w.group;
    const long per = w.group >= w.in ? w.in : w.group / BLOCK;  // blocks in a group, for SPAN 128

    struct Row {
        const uint8_t *codes, *ahead;
        long first, base;  // block; group
        uint8_t rest[LANES * BITS];
        float scale[SEGMENT];
    };

    struct Block {
        Ints words[DWORDS];
        Floats table, scale;
        const int32_t* group_of;
        const float* scales;
    };

    static constexpr int place(int k, int l) { return 8 * l + k; }

    void open(Row& row, long number, long first, long last) const {
        constexpr long AHEAD = 2 * PAIR;  // rows: memory is asked for this early
        row.codes = w.codes + number * bytes;
        row.ahead = row.codes + AHEAD * bytes;
        row.first = first;
        row.base = number * groups;
        if (last > whole) {  // a block is cut off: zeros behind its bytes
            memset(row.rest, 0, sizeof row.rest);
            memcpy(row.rest, row.codes + whole * LANES * BITS, bytes - whole * LANES * BITS);
        }
        if constexpr (SPAN != 128) return;
        for (long block = first; block < last; block += per == 1 ? LANES : 1) {
            const long count = per > 1 ? 1 : last - block < LANES ? last - block : LANES;
            const Floats scales = load_floats(w.scale, w.type, row.base + block / per, count);
            memcpy(row.scale + block - first, &scales, count * sizeof(float));
        }
    }

    void step(Block& part, const Row& row, long block) const {
        const uint8_t* from = block < whole ? row.codes + block * LANES * BITS : row.rest;
        __builtin_prefetch(row.ahead + block * LANES * BITS);
        if constexpr (SMALL) {
            part.words[0] = words<BITS>(from);
            part.table = load<Floats>(w.levels);
        } else {
            int32_t split[DWORDS][LANES] = {};
            for (int d = 0; d < DWORDS; d++)
                for (int l = 0; l < LANES; l++)
                    memcpy(&split[d][l], from + l * BITS + 4 * d, BITS - 4 * d < 4 ? BITS - 4 * d : 4);
            for (int d = 0; d < DWORDS; d++) part.words[d] = load<Ints>(split[d]);
        }
        if constexpr (SPAN == 128) {
            part.scale = all(row.scale[block - row.first]);
            if constexpr (SMALL) part.table *= part.scale;
        } else if constexpr (SPAN == 8) {
            const Ints group = load<Ints>(w.group_of + block * LANES);
            const long from_group = w.group_of[block * LANES], left = groups - from_group;
            const Floats scales = load_floats(w.scale, w.type, row.base + from_group, left < LANES ? left : LANES);
            part.scale = lookup(scales, group - (int)from_group);
        } else {
            part.group_of = w.group_of + block * BLOCK;
            part.scales = (const float*)w.scale + row.base;
        }
    }

    Floats weight(const Block& part, int k) const {
        const int dword = BITS * k / 32, shift = BITS * k % 32;
        typedef uint32_t Unsigned __attribute__((vector_size(64)));
        Unsigned word = (Unsigned)part.words[dword] >> shift;
        if (shift + BITS > 32) word |= (Unsigned)part.words[(dword + 1) % DWORDS] << (32 - shift) % 32;
        if constexpr (SMALL) {
            // A lookup takes four bits; where fewer count, the table repeats.
            const Floats value = lookup(part.table, (Ints)word);
            if constexpr (SPAN == 128) return value;
            return value * scale_of(part, k);
        } else {
            return gather(w.levels, (Ints)(word & ((1u << BITS) - 1))) * scale_of(part, k);
        }
    }

    static Floats scale_of(const Block& part, int k) {
        if constexpr (SPAN > 1) return part.scale;
        return gather(part.scales, load<Ints>(part.group_of + k * LANES));
    }
};

// x float32 [batch, in], y float32 [batch, out]; `scratch` holds ceil(batch / tile) * tile * blocks * 128 floats.
extern "C" void multiply(
    const uint8_t* codes, const void* scale, const float* levels, const int32_t* group_of, int type, long out, long in,
    long group, const float* x, float* scratch, const float* bias, float* y, long batch, int tile, int threads) {
    const Packed w{codes, scale, levels, group_of, (Type)type, out, in, group};
    ordered<Kind>(x, scratch, batch, in, tile, threads);
    multiply_tiles(Kind{w}, Call{scratch, bias, y, out, in, batch, tile, threads});
}

// Rows begin .. end - 1 of W, float32 [rows, blocks * 128], columns in the order `order` brings those of x to.
extern "C" void decode(
    const uint8_t* codes, const void* scale, const float* levels, const int32_t* group_of, int type, long out, long in,
    long group, float* to, long begin, long end, int threads) {
    const Packed w{codes, scale, levels, group_of, (Type)type, out, in, group};
    decode_rows(Kind{w}, to, begin, end, in, threads);
}

extern "C" void order(const float* x, float* to, long batch, long in, int threads) {
    ordered<Kind>(x, to, batch, in, 1, threads);
}
