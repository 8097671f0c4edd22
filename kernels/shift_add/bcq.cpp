// SPDX-License-Identifier: Apache-2.0
// y = x Wᵀ + b,  W[o, i] = Σ_b alpha[o, i / group, b] · ±1, from the bit planes as they are stored.
//
// Per row and group, four bits of a weight select one of 16 sums Σ ±alpha_b: a table that fits in a vector. The four
// planes of 128 columns are transposed in registers to sixteen lanes of eight 4-bit words; a weight is then a shift and
// a lookup. More than four planes are two such tables. Layouts: codec.py beside this file.
#include "linear.h"
#include "planes.h"

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

// The codes of a row.
struct Planes {
    const uint8_t* codes;
    long bytes;

    void open(const Packed& w, long row) {
        bytes = w.bytes();
        codes = w.codes + row * BITS * bytes;
    }

    long whole() const { return bytes / 64 * 4; }

    // The words of four blocks, up to four planes at a time.
    template <bool WHOLE>
    void read(Ints index[QUADS][4], long block) const {
        constexpr long AHEAD = PANEL;  // rows: memory is asked for this early
        const uint8_t* from = codes + block * 16;
        UNROLLED
        for (int b = 0; b < BITS; b++) __builtin_prefetch(from + (AHEAD * BITS + b) * bytes);
        UNROLLED
        for (int f = 0; f < QUADS; f++) {
            Bytes planes[4];
            UNROLLED
            for (int b = 0; b < 4; b++)  // a plane that is not there reads as the last one; its scale is 0
                planes[b] = load_bytes(
                    from + (4 * f + b < BITS ? 4 * f + b : BITS - 1) * bytes, WHOLE ? 64 : bytes - block * 16);
            transposed(index[f], planes);
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

    static constexpr bool DIRECT = DOT_PRODUCTS && QUADS == 1;

    struct Quad {
        Ints index[QUADS][4];
    };

    struct Block {
        Ints index[QUADS];
        Floats table[QUADS][PARTS];
        Shorts pairs[PARTS == 1 ? 1 : 2];  // of tables in bfloat16
    };

    static constexpr int place(int k, int l) { return 64 * (k & 1) + 4 * l + (k >> 1); }
    static constexpr int place_narrow(int k, int l) { return 64 * (k & 1) + 2 * l + (k >> 1); }

    void open(Row& row, long number, long first, long last) const {
        row.planes.open(w, number);
        row.first = first;
        const long end = (w.in * PARTS + BLOCK - 1) / BLOCK;  // units that have a group
        for (long unit = first * PARTS; unit < last * PARTS; unit += LANES) {
            const long count = end - unit < LANES ? end - unit : LANES;
            scales(row, unit - first * PARTS, number * groups, unit, count);
        }
    }

    // The scales of sixteen units from `unit` on, 0 from `count` on; `base` is the row's first group.
    void scales(Row& row, long to, long base, long unit, long count) const {
        if constexpr (SHARED) return shared(row, to, base, unit, count);
        float bases[LANES][BITS] = {};  // of a group, side by side
        if (per == 1) {
            for (long from = 0; from < count * BITS; from += LANES) {
                const long left = count * BITS - from, some = left < LANES ? left : LANES;
                const Floats found = load_floats(w.scale, w.type, (base + unit) * BITS + from, some);
                memcpy(bases[0] + from, &found, some * sizeof(float));
            }
        } else {
            each_group(unit, count, [&](long l, long group, bool again) {
                if (again) {
                    memcpy(bases[l], bases[l - 1], sizeof bases[l]);
                } else {
                    const Floats found = load_floats(w.scale, w.type, (base + group) * BITS, BITS);
                    memcpy(bases[l], &found, sizeof bases[l]);
                }
            });
        }
        for (int b = 0; b < 4 * QUADS; b++)
            for (int l = 0; l < LANES; l++) row.alpha[b][to + l] = b < BITS ? bases[l][b] : 0;
    }

    // alpha = scale · 2^-k; a plane that is not there has none.
    void shared(Row& row, long to, long base, long unit, long count) const {
        constexpr Floats POWERS = {0x1p-0f, 0x1p-1f, 0x1p-2f,  0x1p-3f,  0x1p-4f,  0x1p-5f,  0x1p-6f,  0x1p-7f,
                                   0x1p-8f, 0x1p-9f, 0x1p-10f, 0x1p-11f, 0x1p-12f, 0x1p-13f, 0x1p-14f, 0x1p-15f};
        Floats scale;
        Ints exponents;
        if (per == 1 && count == LANES) {
            scale = load_floats(w.scale, w.type, base + unit, LANES);
            exponents = words<EXPONENTS>(w.shift + (base + unit) * EXPONENTS);
        } else {
            float scales[LANES] = {};
            uint8_t packed[LANES * EXPONENTS] = {};
            each_group(unit, count, [&](long l, long group, bool again) {
                scales[l] = again ? scales[l - 1] : load_floats(w.scale, w.type, base + group, 1)[0];
                memcpy(packed + l * EXPONENTS, w.shift + (base + group) * EXPONENTS, EXPONENTS);
            });
            scale = load<Floats>(scales);
            exponents = words<EXPONENTS>(packed);
        }
        for (int b = 0; b < 4 * QUADS; b++)
            store(&row.alpha[b][to], b < BITS ? scale * lookup(POWERS, exponents >> (4 * b)) : Floats{});
    }

    // use(l, group of the unit l places behind `unit`, whether it is that of the unit before).
    template <class Use>
    void each_group(long unit, long count, const Use& use) const {
        long group = unit / per, left = per - unit % per;
        for (long l = 0; l < count; l++) {
            use(l, group, l > 0 && left != per);
            if (--left == 0) {
                group++;
                left = per;
            }
        }
    }

    long whole(const Row& row) const { return row.planes.whole(); }

    template <bool WHOLE>
    void read(Quad& quad, const Row& row, long block) const {
        row.planes.template read<WHOLE>(quad.index, block);
    }

    void step(Block& part, const Quad& quad, const Row& row, long block, int at) const {
        UNROLLED
        for (int q = 0; q < QUADS; q++) {
            part.index[q] = quad.index[q][at];
            UNROLLED
            for (int p = 0; p < PARTS; p++) {
                const long unit = (block - row.first) * PARTS + p;
                Floats table = row.alpha[4 * q][unit] * SIGNS[0];
                UNROLLED
                for (int b = 1; b < 4; b++) table += row.alpha[4 * q + b][unit] * SIGNS[b];
                part.table[q][p] = table;
            }
        }
        if constexpr (!DIRECT) return;
        UNROLLED
        for (int h = 0; h < (PARTS == 1 ? 1 : 2); h++)  // lane 16 and above find theirs from entry 16 on
            part.pairs[h] = narrowed(part.table[0][PARTS == 4 ? 2 * h : h], part.table[0][PARTS == 4 ? 2 * h + 1 : h]);
    }

#if DOT_PRODUCTS
    Shorts narrow(const Block& part, int k) const {
        // A lookup takes five bits. Where all lanes have one table it is there twice, else the lane decides.
        Shorts word = (Shorts)part.index[0] >> (4 * k);
        if (PARTS == 4) {
            const Shorts upper = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                  16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16};
            word = (word & 15) | upper;
        }
        return lookup(part.pairs[PARTS == 1 ? 0 : k & 1], word);
    }
#endif

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

    typedef Tabled::Quad Quad;

    struct Block {
        Ints index[QUADS];
        const float* alpha;
        const int32_t* first;
    };

    static constexpr bool DIRECT = false;
    static constexpr int place(int k, int l) { return Tabled::place(k, l); }

    void open(Row& row, long number, long, long) const {
        row.planes.open(w, number);
        row.alpha = (const float*)w.scale + number * w.groups() * BITS;
    }

    long whole(const Row& row) const { return row.planes.whole(); }

    template <bool WHOLE>
    void read(Quad& quad, const Row& row, long block) const {
        row.planes.template read<WHOLE>(quad.index, block);
    }

    void step(Block& part, const Quad& quad, const Row& row, long block, int at) const {
        for (int q = 0; q < QUADS; q++) part.index[q] = quad.index[q][at];
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

static Packed packed(const Call& c) {
    return {(const uint8_t*)c.first,  c.scale, (const uint8_t*)c.third, (const int32_t*)c.fourth, (Type)c.scale_type,
            c.out, c.in, c.group};
}

FUNCTIONS(packed)
