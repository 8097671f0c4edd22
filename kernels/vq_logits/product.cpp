// SPDX-License-Identifier: Apache-2.0
// Product heads: the row of token i is C_1[a_1(i)], …, C_G[a_G(i)] side by side, so that its logit is a sum of looked-up
// parts, each of which the tokens share:
//
//   T[g, c] = h_g · C_g[c]        logit_i = Σ_g T[g, a_g(i)] + b_i
//
// The tables of a few groups fit into the first cache while a block of tokens walks through them. With up to eight rows of
// h, an entry of a table holds a number per row and a look-up is one vector.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <vector>

namespace {

constexpr long TOKENS = 1024;  // per block; their sums stay in the first cache, their codes in the second
constexpr long TABLES = 16384; // bytes of the tables that are used together

// Numbers of R rows side by side.
template <int R> struct Rows { typedef float type __attribute__((vector_size(4 * R))); };
template <> struct Rows<1> { typedef float type; };

struct Product {
    const float* codebook;  // [groups, codes, dims]
    const uint8_t* code;    // [tokens, groups]
    const float* bias;      // [tokens], or null
    long groups, codes, dims, tokens;
};

template <int R>
typename Rows<R>::type broadcast(float x) { return x - typename Rows<R>::type{}; }

// logits of R rows; of h [R, groups · dims] and out [.., tokens] only the first `used` rows are there.
template <int R>
bool logits(const Product& p, const float* h, float* out, long used, int threads) {
    typedef typename Rows<R>::type V;
    constexpr long SPAN = 256;  // entries of a table, so that a byte is always inside
    std::vector<V> table(p.groups * SPAN);
    const long together = std::max(1L, TABLES / (long)(SPAN * sizeof(V)));
    const long width = p.groups * p.dims;
    bool good = true;
#pragma omp parallel num_threads(threads) reduction(&& : good)
    {
#pragma omp for schedule(static)
        for (long g = 0; g < p.groups; g++)
            for (long c = 0; c < p.codes; c++) {
                const float* row = p.codebook + (g * p.codes + c) * p.dims;
                float sum[R] = {};
                for (long r = 0; r < used; r++)
                    for (long k = 0; k < p.dims; k++) sum[r] += h[r * width + g * p.dims + k] * row[k];
                memcpy(&table[g * SPAN + c], sum, sizeof sum);
            }
        V sums[TOKENS];
#pragma omp for schedule(static)
        for (long start = 0; start < p.tokens; start += TOKENS) {
            const long count = std::min(TOKENS, p.tokens - start);
            const uint8_t* code = p.code + start * p.groups;
            if (p.codes < SPAN) {
                uint8_t largest = 0;
                for (long i = 0; i < count * p.groups; i++) largest = std::max(largest, code[i]);
                if (largest >= p.codes) {
                    good = false;
                    continue;
                }
            }
            for (long i = 0; i < count; i++) sums[i] = V{};
            for (long first = 0; first < p.groups; first += together) {
                const long last = std::min(first + together, p.groups);
                for (long i = 0; i < count; i++) {
                    const uint8_t* own = code + i * p.groups;
                    // Two sums, for an addition takes longer than a look-up.
                    V even = {}, odd = {};
                    long g = first;
                    for (; g + 2 <= last; g += 2) {
                        even += table[g * SPAN + own[g]];
                        odd += table[(g + 1) * SPAN + own[g + 1]];
                    }
                    if (g < last) even += table[g * SPAN + own[g]];
                    sums[i] += even + odd;
                }
            }
            float by_row[R];
            for (long i = 0; i < count; i++) {
                const V sum = sums[i] + broadcast<R>(p.bias == nullptr ? 0.0f : p.bias[start + i]);
                memcpy(by_row, &sum, sizeof sum);
                for (long r = 0; r < used; r++) out[r * p.tokens + start + i] = by_row[r];
            }
        }
    }
    return good;
}

}  // namespace

extern "C" {

// h is [rows, groups · dims], out [rows, tokens]. `outside` becomes 1 where a code is not in the codebook.
void product_logits(const Product* p, int* outside, const float* h, float* out, long rows, int threads) {
    const long width = p->groups * p->dims;
    bool good = true;
    for (long r = 0; r < rows;) {
        const long left = rows - r;
        const float* x = h + r * width;
        float* to = out + r * p->tokens;
        if (left == 1) good = logits<1>(*p, x, to, 1, threads) && good;
        else if (left <= 4) good = logits<4>(*p, x, to, left, threads) && good;
        else good = logits<8>(*p, x, to, std::min(left, 8L), threads) && good;
        r += left == 1 ? 1 : left <= 4 ? left : std::min(left, 8L);
    }
    *outside = !good;
}
}
