// SPDX-License-Identifier: Apache-2.0
// A tiers head, its codes unpacked a block of tokens at a time, and the logits of its codes for up to CHUNK rows.
#pragma once
#include "dots.h"
#include <cstdlib>
#include <omp.h>
#include <vector>

namespace {

constexpr long BLOCK = 1024;  // tokens: 4 KiB of codes
constexpr long TOGETHER = 8;  // rows whose logits of a code lie side by side
constexpr long FEW = 3;       // from so many rows on they are padded to TOGETHER
constexpr long CHUNK = 64;    // rows whose code logits are held at a time

// What a head consists of.
struct Head {
    const void* codebook;    // [codes, width], `stride` numbers from row to row; null where instead of h come its products
    const uint8_t* code_of;  // [tokens, bytes], lowest byte first
    const float* bias;       // [tokens], or null
    long stride, codes, width, tokens;
    int bytes;

    long padded() const { return (codes + 15) / 16 * 16; }
    long given() const { return codebook == nullptr ? codes : width; }  // numbers of a row
};

// The codes of up to BLOCK tokens.
struct Codes {
    int32_t code[BLOCK];
    long count;

    // False if a code is not in the codebook.
    bool read(const Head& head, long start, long end) {
        count = std::min(BLOCK, end - start);
        const uint8_t* packed = head.code_of + start * head.bytes;
        if (head.bytes == 1) unpack<1>(packed);
        else if (head.bytes == 2) unpack<2>(packed);
        else unpack<3>(packed);
        int32_t largest = 0;
#pragma omp simd reduction(max : largest)
        for (long i = 0; i < count; i++) largest = std::max(largest, code[i]);
        return largest < head.codes;
    }

    template <int BYTES> void unpack(const uint8_t* packed) {
        for (long i = 0; i < count; i++) {
            int32_t number = 0;
            for (int b = 0; b < BYTES; b++) number |= (int32_t)packed[i * BYTES + b] << 8 * b;
            code[i] = number;
        }
    }
};

// The first of some rows that are handled together, how many there are, and the distance of two codes' logits.
struct Group {
    long first, rows, side;
};

std::vector<Group> grouped(long rows) {
    std::vector<Group> groups;
    for (long r = 0; r < rows;) {
        const bool many = rows - r >= FEW;
        groups.push_back({r, many ? std::min(TOGETHER, rows - r) : 1, many ? TOGETHER : 1});
        r += groups.back().rows;
    }
    return groups;
}

// Logits of the codes for up to CHUNK rows, rounded to the type of h.
template <class T> struct CodeLogits {
    const Head& head;
    std::vector<Group> groups;
    T* table;

    CodeLogits(const Head& head, long rows) : head(head), groups(grouped(rows)) {
        const Group& last = groups.back();
        table = (T*)aligned_alloc(64, (last.first + last.side) * head.padded() * sizeof(T));
    }
    CodeLogits(const CodeLogits&) = delete;
    ~CodeLogits() { free(table); }

    // [padded, side]
    T* of(const Group& group) const { return table + group.first * head.padded(); }

    // By a team of threads, who wait for each other at the end.
    void fill(const T* h) const {
        if (head.codebook == nullptr) {
#pragma omp for schedule(static)
            for (long g = 0; g < (long)groups.size(); g++) {
                const Group& group = groups[g];
                T* l = of(group);
                for (long r = 0; r < group.side; r++) {
                    const T* from = h + (group.first + std::min(r, group.rows - 1)) * head.codes;
                    for (long j = 0; j < head.codes; j++) l[j * group.side + r] = from[j];
                }
            }
            return;
        }
#ifdef OWN_PRODUCT
        const Book<T> book = {(const T*)head.codebook, head.stride, head.codes, head.width};
        const long block = book.block();
#pragma omp for schedule(static)
        for (long first = 0; first < head.codes; first += block) {
            const long last = std::min(first + block, head.padded());
            for (long g = 0; g < (long)groups.size(); g++) {
                const Group& group = groups[g];
                const T* row[SIDE];
                for (long r = 0; r < SIDE; r++) row[r] = h + (group.first + std::min(r, group.rows - 1)) * head.width;
                if (group.side == 1) one_row(book, row[0], first, last, of(group));
                else rows_together(book, row, first, last, g, (long)groups.size(), of(group));
            }
        }
#endif
    }
};

}  // namespace
