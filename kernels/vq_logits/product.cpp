// SPDX-License-Identifier: Apache-2.0
// Product heads: the row of token i is C_1[a_1(i)], …, C_G[a_G(i)] side by side, so that its logit is a sum of looked-up
// parts, each of which the tokens share:
//
//   T[g, c] = h_g · C_g[c]        logit_i = Σ_g T[g, a_g(i)] + b_i
//
// The tables of a few groups fit into the first cache while a block of tokens walks through them. With up to eight rows of
// h, an entry of a table holds a number per row and a look-up is one vector.
#include <algorithm>
#ifdef __AVX512VBMI__
#include <immintrin.h>
#endif
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#include <vector>

namespace {

constexpr long TOKENS = 2048;  // per block; of all sizes tried, and with the next, the fastest on Zen 5
constexpr long TABLES = 32768;  // bytes of the tables that are used together: most of the first cache

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

bool inside(const uint8_t* code, long count, long codes) {
    uint8_t largest = 0;
    for (long i = 0; i < count; i++) largest = std::max(largest, code[i]);
    return largest < codes;
}

#ifdef __AVX512VBMI__
// One row of h, 64 tokens at a time. A table of 256 floats is four tables of their bytes, and the processor looks 64 bytes
// up in 128 at once: two look-ups and a choice per byte, then the bytes of a float are put together again. So no number is
// rounded. Codes lie token by token; 16 groups of 64 tokens are transposed in registers first.

constexpr int LANES = 64, GROUPS = 16;

// rows[4 q .. 4 q + 3] of 16 bytes each -> by[g]: byte g of every row, rows in order.
inline void transpose(const uint8_t* code, long stride, __m512i by[GROUPS]) {
    __m512i a[16], b[16];
    for (int q = 0; q < 16; q++) {  // rows q, q + 16, q + 32, q + 48 in the four parts of a register
        auto row = [&](int part) { return _mm_loadu_si128((const __m128i*)(code + (q + 16 * part) * stride)); };
        __m512i x = _mm512_castsi128_si512(row(0));
        x = _mm512_inserti32x4(x, row(1), 1);
        x = _mm512_inserti32x4(x, row(2), 2);
        a[q] = _mm512_inserti32x4(x, row(3), 3);
    }
    // 16 × 16 bytes in each part: unpacking row q with row q + 8 four times is the transposition.
    for (int turn = 0; turn < 4; turn++) {
        for (int q = 0; q < 8; q++) {
            b[2 * q] = _mm512_unpacklo_epi8(a[q], a[q + 8]);
            b[2 * q + 1] = _mm512_unpackhi_epi8(a[q], a[q + 8]);
        }
        std::copy(b, b + 16, a);
    }
    std::copy(a, a + 16, by);
}

inline __m512i looked_up(const uint8_t* table, __m512i code, __mmask64 upper) {
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(table), code, _mm512_load_si512(table + 64));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), code, _mm512_load_si512(table + 192));
    return _mm512_mask_blend_epi8(upper, low, high);
}

// table: [groups, 4, 256] bytes. Sums of 64 tokens, in the order in which unpacking leaves them.
struct Sums {
    __m512 part[4] = {};

    void add(const uint8_t* table, __m512i code) {
        const __mmask64 upper = _mm512_movepi8_mask(code);
        const __m512i b0 = looked_up(table, code, upper), b1 = looked_up(table + 256, code, upper);
        const __m512i b2 = looked_up(table + 512, code, upper), b3 = looked_up(table + 768, code, upper);
        const __m512i low0 = _mm512_unpacklo_epi8(b0, b1), low1 = _mm512_unpackhi_epi8(b0, b1);
        const __m512i high0 = _mm512_unpacklo_epi8(b2, b3), high1 = _mm512_unpackhi_epi8(b2, b3);
        part[0] += _mm512_castsi512_ps(_mm512_unpacklo_epi16(low0, high0));
        part[1] += _mm512_castsi512_ps(_mm512_unpackhi_epi16(low0, high0));
        part[2] += _mm512_castsi512_ps(_mm512_unpacklo_epi16(low1, high1));
        part[3] += _mm512_castsi512_ps(_mm512_unpackhi_epi16(low1, high1));
    }

    // Token 16 a + 4 p + i is lane 4 a + i of part p.
    void store(float* out) const {
        for (int p = 0; p < 4; p++) {
            float lane[16];
            _mm512_storeu_ps(lane, part[p]);
            for (int a = 0; a < 4; a++) memcpy(out + 16 * a + 4 * p, lane + 4 * a, 16);
        }
    }
};

void one_row(const uint8_t* table, const uint8_t* code, long groups, float* sums) {
    const long whole = groups / GROUPS * GROUPS;
    Sums total;
    __m512i by[GROUPS];
    for (long g = 0; g < whole; g += GROUPS) {
        transpose(code + g, groups, by);
        for (int k = 0; k < GROUPS; k++) total.add(table + (g + k) * 1024, by[k]);
    }
    alignas(64) uint8_t own[LANES];
    for (long g = whole; g < groups; g++) {
        for (int i = 0; i < LANES; i++) own[i] = code[i * groups + g];
        total.add(table + g * 1024, _mm512_load_si512(own));
    }
    total.store(sums);
}

bool logits_of_one(const Product& p, const float* h, float* out, int threads) {
    uint8_t* table = (uint8_t*)aligned_alloc(64, p.groups * 1024);
    bool good = true;
#pragma omp parallel num_threads(threads) reduction(&& : good)
    {
#pragma omp for schedule(static)
        for (long g = 0; g < p.groups; g++)
            for (long c = 0; c < 256; c++) {
                const float* row = p.codebook + (g * p.codes + std::min(c, p.codes - 1)) * p.dims;
                float sum = 0;
                for (long k = 0; k < p.dims; k++) sum += h[g * p.dims + k] * row[k];
                uint8_t byte[4];
                memcpy(byte, &sum, 4);
                for (int b = 0; b < 4; b++) table[g * 1024 + b * 256 + c] = byte[b];
            }
#pragma omp for schedule(static)
        for (long start = 0; start < p.tokens; start += LANES) {
            const long count = std::min((long)LANES, p.tokens - start);
            const uint8_t* code = p.code + start * p.groups;
            std::vector<uint8_t> padded;
            if (count < LANES) {
                padded.assign(LANES * p.groups, 0);
                memcpy(padded.data(), code, count * p.groups);
                code = padded.data();
            }
            if (p.codes < 256 && !inside(code, count * p.groups, p.codes)) {
                good = false;
                continue;
            }
            float sums[LANES];
            one_row(table, code, p.groups, sums);
            for (long i = 0; i < count; i++) out[start + i] = sums[i] + (p.bias == nullptr ? 0.0f : p.bias[start + i]);
        }
    }
    free(table);
    return good;
}
constexpr long ALONE = 4;  // rows that are faster one by one than together
#else
constexpr long ALONE = 1;
#endif

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
            if (p.codes < SPAN && !inside(code, count * p.groups, p.codes)) {
                good = false;
                continue;
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

#ifndef __AVX512VBMI__
bool logits_of_one(const Product& p, const float* h, float* out, int threads) { return logits<1>(p, h, out, 1, threads); }
#endif

}  // namespace

extern "C" {

// h is [rows, groups · dims], out [rows, tokens]. `outside` becomes 1 where a code is not in the codebook.
void product_logits(const Product* p, int* outside, const float* h, float* out, long rows, int threads) {
    const long width = p->groups * p->dims;
    bool good = true;
    for (long r = 0; r < rows;) {
        const long left = std::min(rows - r, 8L);
        const float* x = h + r * width;
        float* to = out + r * p->tokens;
        const long done = left <= ALONE ? 1 : left;
        good = (done == 1 ? logits_of_one(*p, x, to, threads) : logits<8>(*p, x, to, done, threads)) && good;
        r += done;
    }
    *outside = !good;
}
}
