// SPDX-License-Identifier: Apache-2.0
// Tiers heads after the product with the codebook, l = h Cᵀ: every token reads the logit of its code.
//
//   logit_i = l_{M(i)} + b_i        B_j = log Σ_{M(i)=j} exp b_i        log Z = log Σ_j exp(l_j + B_j)
//
// Codes are unpacked from the bytes they are stored in, a block of tokens at a time for all rows.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <vector>

namespace {

constexpr long BLOCK = 2048;  // tokens: 8 KiB of codes

struct BFloat {
    uint16_t bits;
    explicit BFloat(float x) {  // nearest, ties to even; NaN stays NaN
        uint32_t b;
        memcpy(&b, &x, 4);
        bits = x != x ? (uint16_t)(b >> 16 | 0x40) : (uint16_t)((b + 0x7FFF + (b >> 16 & 1)) >> 16);
    }
    explicit operator float() const {
        const uint32_t b = (uint32_t)bits << 16;
        float x;
        memcpy(&x, &b, 4);
        return x;
    }
};

// What a head consists of, beside its codebook.
struct Head {
    const uint8_t* code_of;  // [tokens, bytes], lowest byte first
    const float* bias;       // [tokens], or null
    long codes, tokens;
    int bytes;
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

    template <int BYTES>
    void unpack(const uint8_t* packed) {
        for (long i = 0; i < count; i++) {
            int32_t number = 0;
            for (int b = 0; b < BYTES; b++) number |= (int32_t)packed[i * BYTES + b] << 8 * b;
            code[i] = number;
        }
    }
};

template <class T>
bool expand(const Head& head, const float* l, T* out, long rows, int threads) {
    bool good = true;
    const long blocks = (head.tokens + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(&& : good)
    for (long block = 0; block < blocks; block++) {
        const long start = block * BLOCK;
        Codes codes;
        if (!codes.read(head, start, head.tokens)) {
            good = false;
            continue;
        }
        for (long r = 0; r < rows; r++) {
            const float *logits = l + r * head.codes, *bias = head.bias + start;
            T* to = out + r * head.tokens + start;
            if (head.bias == nullptr)
#pragma omp simd
                for (long i = 0; i < codes.count; i++) to[i] = (T)logits[codes.code[i]];
            else
#pragma omp simd
                for (long i = 0; i < codes.count; i++) to[i] = (T)(logits[codes.code[i]] + bias[i]);
        }
    }
    return good;
}

// B_j of every code; -inf for one no token has. The largest bias of a code keeps exp in range.
bool log_masses(const Head& head, float* mass) {
    std::vector<float> top(head.codes, head.bias == nullptr ? 0.0f : -INFINITY);
    Codes codes;
    float weight[BLOCK];
    for (long start = 0; start < head.tokens; start += BLOCK) {
        if (!codes.read(head, start, head.tokens)) return false;
        for (long i = 0; head.bias != nullptr && i < codes.count; i++)
            top[codes.code[i]] = std::max(top[codes.code[i]], head.bias[start + i]);
    }
    for (float& t : top) t = std::isfinite(t) ? t : 0.0f;
    std::fill(mass, mass + head.codes, 0.0f);
    for (long start = 0; start < head.tokens; start += BLOCK) {
        codes.read(head, start, head.tokens);
        if (head.bias == nullptr) {
            for (long i = 0; i < codes.count; i++) mass[codes.code[i]] += 1.0f;
            continue;
        }
#pragma omp simd
        for (long i = 0; i < codes.count; i++) weight[i] = expf(head.bias[start + i] - top[codes.code[i]]);
        for (long i = 0; i < codes.count; i++) mass[codes.code[i]] += weight[i];
    }
#pragma omp simd
    for (long j = 0; j < head.codes; j++) mass[j] = logf(mass[j]) + top[j];
    return true;
}

// log Σ_j exp(l_j + B_j); infinite where the largest term is, NaN where one is.
float log_partition(const float* l, const float* mass, long codes) {
    float top = -INFINITY, sum = 0;
    int undefined = 0;  // a NaN is larger than nothing
#pragma omp simd reduction(max : top) reduction(| : undefined)
    for (long j = 0; j < codes; j++) {
        const float x = l[j] + mass[j];
        undefined |= x != x;
        top = x > top ? x : top;
    }
    if (undefined) return NAN;
    if (std::isinf(top)) return top;
#pragma omp simd reduction(+ : sum)
    for (long j = 0; j < codes; j++) sum += expf(l[j] + mass[j] - top);
    return logf(sum) + top;
}

struct Candidate {
    float value;
    int32_t token;
};

// Larger first, NaN before everything as in torch, of equals the smaller token.
bool before(const Candidate& a, const Candidate& b) {
    const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    if (a_nan || b_nan) return a_nan && (!b_nan || a.token < b.token);
    return a.value > b.value || (a.value == b.value && a.token < b.token);
}

// The k largest of a row. Tokens come in order: one that only equals the k-th so far comes too late.
template <class T>
bool largest(const Head& head, const float* l, long k, float* values, int64_t* tokens) {
    std::vector<Candidate> kept;
    kept.reserve(k + BLOCK);
    Codes codes;
    float value[BLOCK];
    float least = -INFINITY;
    bool full = false;
    for (long start = 0; start < head.tokens; start += BLOCK) {
        if (!codes.read(head, start, head.tokens)) return false;
        int any = 0;
#pragma omp simd reduction(| : any)
        for (long i = 0; i < codes.count; i++) {
            value[i] = head.bias == nullptr ? l[codes.code[i]] : (float)(T)(l[codes.code[i]] + head.bias[start + i]);
            any |= !(value[i] <= least);
        }
        if (full && !any) continue;
        for (long i = 0; i < codes.count; i++)
            if (!full || !(value[i] <= least)) kept.push_back({value[i], (int32_t)(start + i)});
        if ((long)kept.size() < k) continue;
        std::nth_element(kept.begin(), kept.begin() + (k - 1), kept.end(), before);
        kept.resize(k);
        least = kept[k - 1].value;
        full = true;
    }
    std::sort(kept.begin(), kept.end(), before);
    for (long i = 0; i < k; i++) values[i] = kept[i].value, tokens[i] = kept[i].token;
    return true;
}

}  // namespace

// l is [rows, codes] in float32, already rounded to the type of the activations. `outside` becomes 1 where a code or a target
// lies outside; the results are then not to be used.
extern "C" {

void tiers_logits_f32(const Head* head, int* outside, const float* l, float* out, long rows, int threads) {
    *outside = !expand(*head, l, out, rows, threads);
}

void tiers_logits_bf16(const Head* head, int* outside, const float* l, void* out, long rows, int threads) {
    *outside = !expand(*head, l, (BFloat*)out, rows, threads);
}

// Log Z of every row; with targets the loss of every row, 0 where the target is `ignored`.
void tiers_losses(const Head* head, int* outside, const float* l, const int64_t* target, float* out, long rows,
                  long ignored, int threads) {
    std::vector<float> mass(head->codes);
    bool good = log_masses(*head, mass.data());
#pragma omp parallel for num_threads(threads) if (rows > 1) reduction(&& : good)
    for (long r = 0; r < rows; r++) {
        const float* logits = l + r * head->codes;
        if (target == nullptr) {
            out[r] = log_partition(logits, mass.data(), head->codes);
            continue;
        }
        const long token = target[r];
        out[r] = 0;
        if (token == ignored) continue;
        Codes code;
        if (token < 0 || token >= head->tokens || !code.read(*head, token, token + 1)) {
            good = false;
            continue;
        }
        const float logit = logits[code.code[0]] + (head->bias == nullptr ? 0.0f : head->bias[token]);
        out[r] = log_partition(logits, mass.data(), head->codes) - logit;
    }
    *outside = !good;
}

void tiers_topk(const Head* head, int* outside, const float* l, float* values, int64_t* tokens, long rows, long k,
                int narrow, int threads) {
    bool good = true;
#pragma omp parallel for num_threads(threads) if (rows > 1) reduction(&& : good)
    for (long r = 0; r < rows; r++) {
        const float* logits = l + r * head->codes;
        const bool found = narrow ? largest<BFloat>(*head, logits, k, values + r * k, tokens + r * k)
                                  : largest<float>(*head, logits, k, values + r * k, tokens + r * k);
        good = good && found;
    }
    *outside = !good;
}
}
