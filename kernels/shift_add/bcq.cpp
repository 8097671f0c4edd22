// SPDX-License-Identifier: Apache-2.0
// y = x Wᵀ + b,  W[o, i] = Σ_b alpha[o, i / group, b] · ±1, from the bit planes as they are stored.
//
// Per row and group, four bits of a weight select one of 16 sums Σ ±alpha_b: a table that fits in a vector. The four
// planes of 128 columns are transposed in registers to sixteen lanes of eight 4-bit words; a weight is then a shift and
// a lookup. More than four planes are two such tables. Layouts: codec.py beside this file.
#include "linear.h"

constexpr Floats SIGNS[4] = {
    {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1},
    {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1},
    {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1},
    {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1}};

// Compiled for one format at a time: BITS 1 to 8; PARTS tables per 128 columns, 0 where groups are of another width;
// SHARED one scale per group beside exponents, else one per basis.
constexpr int QUADS = (BITS + 3) / 4;
constexpr int EXPONENTS = (BITS + 1) / 2;  // bytes of a group's packed exponents

struct Packed {
    const uint8_t* codes;  // [out, BITS, ceil(in / 8)]
    const void* scale;     // [out, groups, BITS], or if SHARED [out, groups]
    const uint8_t* shift;  // [out, groups, ceil(BITS / 2)], only if SHARED
    const int32_t* first;  // [blocks, VECTORS, LANES]: where a weight's scales begin in its row; only for PARTS 0
    Type type;             // of the scales
    long out, in, group;

    long bytes() const { return (in + 7) / 8; }
    long groups() const { return (in + group - 1) / group; }
};

// The codes of a row, by block: in place, or from a copy padded with zeros where a block is cut off.
struct Planes {
    const uint8_t *codes, *ahead;
    long bytes, whole;
    uint8_t rest[BITS][16];

    void open(const Packed& w, long row) {
        constexpr long AHEAD = 2 * PAIR;  // rows: memory is asked for this early
        bytes = w.bytes();
        whole = bytes / 16;
        codes = w.codes + row * BITS * bytes;
        ahead = codes + AHEAD * BITS * bytes;
        if (bytes % 16 == 0) return;
        memset(rest, 0, sizeof rest);
        for (int b = 0; b < BITS; b++) memcpy(rest[b], codes + b * bytes + whole * 16, bytes % 16);
    }

    void read(Ints index[QUADS], long block) const {
        const uint8_t* from = block < whole ? codes + block * 16 : rest[0];
        const long stride = block < whole ? bytes : 16;
        if (block % 4 == 0) {  // a cache line of every plane
            UNROLLED
            for (int b = 0; b < BITS; b++) __builtin_prefetch(ahead + b * bytes + block * 16);
        }
        UNROLLED
        for (int q = 0; q < QUADS; q++) {
            // A plane that is not there reads as the last one; its scale is 0.
            const auto plane = [=](int b) { return from + (4 * q + b < BITS ? 4 * q + b : BITS - 1) * stride; };
            index[q] = transposed(plane(0), plane(1), plane(2), plane(3));
        }
    }
};

// Groups of a multiple of 128 / PARTS columns, PARTS in 1, 2, 4; or one group for the row, PARTS 1.
struct Tabled {
    static constexpr int UNITS = SEGMENT * PARTS;
    const Packed& w;
    const long per = w.group >= w.in ? w.in : w.group / (BLOCK / PARTS);  // units of 128 / PARTS columns in a group
    const long groups = w.groups();

    struct Row {
        Planes planes;
        long first;
        float alpha[4 * QUADS][UNITS];
    };

    struct Block {
        Ints index[QUADS];
        Floats table[QUADS][PARTS];
    };

    static constexpr int place(int k, int l) { return 64 * (k & 1) + 4 * l + (k >> 1); }

    void open(Row& row, long number, long first, long last) const {
        if (first == 0) row.planes.open(w, number);
        row.first = first;
        const long end = (w.in * PARTS + BLOCK - 1) / BLOCK;  // units that have a group
        for (long unit = first * PARTS; unit < last * PARTS; unit += LANES) {
            const long count = end - unit < LANES ? end - unit : LANES;
            scales(row, unit - first * PARTS, number * groups, unit, count);
        }
    }

    // The scales of sixteen units from `unit` on, 0 from `count` on; `base` is the row's first group.
    void scales(Row& row, long to, long base, long unit, long count) const {
        if constexpr (!SHARED) {
            float bases[LANES][BITS];  // of a group, side by side
            if (per == 1) {
                for (long from = 0; from < count * BITS; from += LANES) {
                    const long left = count * BITS - from, some = left < LANES ? left : LANES;
                    store(bases[0] + from, load_floats(w.scale, w.type, (base + unit) * BITS + from, some));
                }
            } else {
                for (long l = 0; l < count; l++) {
                    const Floats group = load_floats(w.scale, w.type, (base + (unit + l) / per) * BITS, BITS);
                    memcpy(bases[l], &group, sizeof bases[l]);
                }
            }
            for (int b = 0; b < 4 * QUADS; b++)
                for (int l = 0; l < LANES; l++) row.alpha[b][to + l] = b < BITS && l < count ? bases[l][b] : 0;
            return;
        }
        Floats shared{};
        uint8_t copy[LANES * EXPONENTS] = {};
        const uint8_t* packed = copy;
        if (per == 1 && count == LANES) {
            shared = load_floats(w.scale, w.type, base + unit, LANES);
            packed = w.shift + (base + unit) * EXPONENTS;
        } else {
            for (long l = 0; l < count; l++) {
                const long group = base + (unit + l) / per;
                shared[l] = load_floats(w.scale, w.type, group, 1)[0];
                memcpy(copy + l * EXPONENTS, w.shift + group * EXPONENTS, EXPONENTS);
            }
        }
        const Ints exponents = words<EXPONENTS>(packed);
        for (int b = 0; b < 4 * QUADS; b++) {
            // alpha = scale · 2^-k; a plane that is not there has none
            const Floats factor = (Floats)((127 - ((exponents >> (4 * b)) & 15)) << 23);
            store(&row.alpha[b][to], b < BITS ? shared * factor : Floats{});
        }
    }

    void step(Block& part, const Row& row, long block) const {
        row.planes.read(part.index, block);
        UNROLLED
        for (int q = 0; q < QUADS; q++) {
            UNROLLED
            for (int p = 0; p < PARTS; p++) {
                const long unit = (block - row.first) * PARTS + p;
                Floats table = row.alpha[4 * q][unit] * SIGNS[0];
                UNROLLED
                for (int b = 1; b < 4; b++) table += row.alpha[4 * q + b][unit] * SIGNS[b];
                part.table[q][p] = table;
            }
        }
    }

    Floats weight(const Block& part, int k) const {
        Floats total = pick(part.table[0], part.index[0] >> (4 * k), k & 1);
        if (QUADS == 2) total += pick(part.table[QUADS - 1], part.index[QUADS - 1] >> (4 * k), k & 1);
        return total;
    }

    // Lane l of vector k is column 64 * (k & 1) + 4 * l + ... of the block, so in quarter 2 * (k & 1) + (l >= 8).
    static Floats pick(const Floats* tables, Ints index, int half) {
        if (PARTS == 1) return lookup(tables[0], index);
        if (PARTS == 2) return lookup(tables[half], index);
        const Ints upper = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
        return upper ? lookup(tables[(2 * half + 1) % PARTS], index) : lookup(tables[2 * half % PARTS], index);
    }
};

// Groups of any width: every lane fetches its own scales, which are float32 and free ([out, groups, bits]).
struct Scattered {
    const Packed& w;

    struct Row {
        Planes planes;
        const float* alpha;
    };

    struct Block {
        Ints index[QUADS];
        const float* alpha;
        const int32_t* first;
    };

    static constexpr int place(int k, int l) { return Tabled::place(k, l); }

    void open(Row& row, long number, long first, long) const {
        if (first != 0) return;
        row.planes.open(w, number);
        row.alpha = (const float*)w.scale + number * w.groups() * BITS;
    }

    void step(Block& part, const Row& row, long block) const {
        row.planes.read(part.index, block);
        part.alpha = row.alpha;
        part.first = w.first + block * BLOCK;
    }

    Floats weight(const Block& part, int k) const {
        const Ints first = load<Ints>(part.first + k * LANES);
        Floats total{};
        UNROLLED
        for (int b = 0; b < BITS; b++) {
            const Ints bit = part.index[b / 4] >> (4 * k + b % 4);
            total += (Floats)((Ints)gather(part.alpha + b, first) ^ (~bit << 31));
        }
        return total;
    }
};

using Kind = std::conditional_t<PARTS == 0, Scattered, Tabled>;

// x float32 [batch, in], y float32 [batch, out]; `scratch` holds ceil(batch / tile) * tile * blocks * 128 floats.
extern "C" void multiply(
    const uint8_t* codes, const void* scale, const uint8_t* shift, const int32_t* first, int type, long out, long in,
    long group, const float* x, float* scratch, const float* bias, float* y, long batch, int tile, int threads) {
    const Packed w{codes, scale, shift, first, (Type)type, out, in, group};
    ordered<Kind>(x, scratch, batch, in, tile, threads);
    multiply_tiles(Kind{w}, Call{scratch, bias, y, out, in, batch, tile, threads});
}

// Rows begin .. end - 1 of W, float32 [rows, blocks * 128], columns in the order `order` brings those of x to.
extern "C" void decode(
    const uint8_t* codes, const void* scale, const uint8_t* shift, const int32_t* first, int type, long out, long in,
    long group, float* to, long begin, long end, int threads) {
    const Packed w{codes, scale, shift, first, (Type)type, out, in, group};
    decode_rows(Kind{w}, to, begin, end, in, threads);
}

extern "C" void order(const float* x, float* to, long batch, long in, int threads) {
    ordered<Kind>(x, to, batch, in, 1, threads);
}
