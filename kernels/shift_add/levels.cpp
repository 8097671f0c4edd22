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
    const long bytes = (w.in * BITS + 7) / 8, whole_blocks = bytes / (LANES * BITS);
    const long groups = (w.in + w.group - 1) / w.group;
    const long per = w.group >= w.in ? w.in : w.group / BLOCK;  // blocks in a group, for SPAN 128

    static constexpr bool DIRECT = DOT_PRODUCTS && BITS == 4 && SPAN == 128;

    struct Row {
        const uint8_t* codes;
        long first, base;  // block; group
        uint8_t rest[LANES * BITS];
        float scale[SEGMENT];
    };

    struct Quad {};

    struct Block {
        Ints words[DWORDS];
        Floats table, scale;
        Shorts pairs;  // the table in bfloat16, twice
        const int32_t* group_of;
        const float* scales;
    };

    static constexpr int place(int k, int l) { return 8 * l + k; }
    static constexpr int place_narrow(int k, int l) { return 4 * l + k; }

    void open(Row& row, long number, long first, long last) const {
        row.codes = w.codes + number * bytes;
        row.first = first;
        row.base = number * groups;
        if (last > whole_blocks) {  // a block is cut off: zeros behind its bytes
            memset(row.rest, 0, sizeof row.rest);
            memcpy(row.rest, row.codes + whole_blocks * LANES * BITS, bytes - whole_blocks * LANES * BITS);
        }
        if constexpr (SPAN != 128) return;
        for (long block = first; block < last; block += per == 1 ? LANES : 1) {
            const long count = per > 1 ? 1 : last - block < LANES ? last - block : LANES;
            const Floats scales = load_floats(w.scale, w.type, row.base + block / per, count);
            memcpy(row.scale + block - first, &scales, count * sizeof(float));
        }
    }

    long whole(const Row&) const { return whole_blocks; }

    template <bool WHOLE>
    void read(Quad&, const Row& row, long block) const {
        constexpr long AHEAD = PANEL;  // rows: memory is asked for this early
        UNROLLED
        for (int line = 0; line < BITS; line++)  // four blocks are so many cache lines
            __builtin_prefetch(row.codes + AHEAD * bytes + block * LANES * BITS + 64 * line);
    }

    void step(Block& part, const Quad&, const Row& row, long block, int) const {
        const uint8_t* from = block < whole_blocks ? row.codes + block * LANES * BITS : row.rest;
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
            if constexpr (DIRECT) part.pairs = narrowed(part.table, part.table);
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

#if DOT_PRODUCTS
    Shorts narrow(const Block& part, int k) const { return lookup(part.pairs, (Shorts)part.words[0] >> (4 * k)); }
#endif

    static Floats scale_of(const Block& part, int k) {
        if constexpr (SPAN > 1) return part.scale;
        return gather(part.scales, load<Ints>(part.group_of + k * LANES));
    }
};

static Packed packed(const Call& c) {
    return {(const uint8_t*)c.first, c.scale, (const float*)c.third, (const int32_t*)c.fourth, (Type)c.scale_type,
            c.out, c.in, c.group};
}

FUNCTIONS(packed)
