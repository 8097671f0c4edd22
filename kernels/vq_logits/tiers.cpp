// SPDX-License-Identifier: Apache-2.0
// Tiers heads: l = h Cᵀ for the codes alone, then every token reads the logit of its code.
//
//   logit_i = l_{M(i)} + b_i
//   log Z   = log Σ_j w_j exp(l_j + t_j)        t_j = max b_i, w_j = Σ exp(b_i − t_j) over M(i) = j
//
// A call is one parallel region; what threads add up is divided in the same way for any number of them, so that their number
// does not change a bit.
#include "expand.h"
#include "head.h"

namespace {

constexpr long PARTS = 4;  // of the tokens, counted apart

// The code logits and nothing else.
template <class T> bool product(const Head& head, const T* h, long rows, int threads) {
    for (long start = 0; start < rows; start += CHUNK) {
        const CodeLogits<T> l(head, std::min(CHUNK, rows - start));
#pragma omp parallel num_threads(threads)
        l.fill(h + start * head.given());
    }
    return true;
}

template <class T> bool logits(const Head& head, const T* h, T* out, long rows, int threads) {
    bool good = true;
    for (long start = 0; start < rows; start += CHUNK) {
        const long count = std::min(CHUNK, rows - start);
        const CodeLogits<T> l(head, count);
#pragma omp parallel num_threads(threads) reduction(&& : good)
        {
            l.fill(h + start * head.given());
            T unwanted[BLOCK];
#pragma omp for schedule(static)
            for (long token = 0; token < head.tokens; token += BLOCK) {
                Codes codes;
                if (!codes.read(head, token, head.tokens)) {
                    good = false;
                    continue;
                }
                const float* bias = head.bias == nullptr ? nullptr : head.bias + token;
                for (const Group& group : l.groups) {
                    T* to[TOGETHER];
                    for (long r = 0; r < TOGETHER; r++)
                        to[r] = r < group.rows ? out + (start + group.first + r) * head.tokens + token : unwanted;
                    if (group.side == 1) expand_row(l.of(group), codes.code, bias, codes.count, to[0]);
                    else expand_rows(l.of(group), codes.code, bias, codes.count, to);
                }
            }
        }
    }
    return good;
}

// ------------------------------------------------------------------------------------------------------------- losses

// t_j and w_j of every code; -inf and 0 for one no token has. Counted by a team of threads.
struct Masses {
    const Head& head;
    std::vector<float> top, weight, part;  // part: [PARTS, codes]
    bool good = true;

    explicit Masses(const Head& head) : head(head), top(head.codes), weight(head.codes), part(PARTS * head.codes) {}

    // f(part, tokens' codes, first of them) for every block of tokens, a part of them on one thread.
    template <class F> void each(float initial, F f) {
#pragma omp for schedule(static)
        for (long p = 0; p < PARTS; p++) {
            float* own = &part[p * head.codes];
            std::fill(own, own + head.codes, initial);
            const long per = (head.tokens + PARTS - 1) / PARTS, end = std::min(head.tokens, (p + 1) * per);
            Codes codes;
            for (long token = p * per; token < end; token += BLOCK)
                if (codes.read(head, token, end)) f(own, codes, token);
                else
#pragma omp atomic write
                    good = false;
        }
    }

    void count() {
        if (head.bias == nullptr) {
            each(0.0f, [](float* own, const Codes& codes, long) {
                for (long i = 0; i < codes.count; i++) own[codes.code[i]] += 1.0f;
            });
            sum([](float, float w) { return w > 0 ? 0.0f : -INFINITY; });
            return;
        }
        const float* bias = head.bias;
        each(-INFINITY, [=](float* own, const Codes& codes, long token) {
            for (long i = 0; i < codes.count; i++) own[codes.code[i]] = std::max(own[codes.code[i]], bias[token + i]);
        });
#pragma omp for schedule(static)
        for (long j = 0; j < head.codes; j++) {
            float t = part[j];
            for (long p = 1; p < PARTS; p++) t = std::max(t, part[p * head.codes + j]);
            top[j] = std::isfinite(t) ? t : 0.0f;
        }
        const float* shift = top.data();
        each(0.0f, [=](float* own, const Codes& codes, long token) {
            float share[BLOCK];
            for (long i = 0; i < codes.count; i++) share[i] = bias[token + i] - shift[codes.code[i]];
            exponentials(share, codes.count);
            for (long i = 0; i < codes.count; i++) own[codes.code[i]] += share[i];
        });
        sum([](float t, float w) { return w == 0 ? -INFINITY : std::isinf(w) ? w : t; });
    }

    template <class F> void sum(F f) {
#pragma omp for schedule(static)
        for (long j = 0; j < head.codes; j++) {
            float w = part[j];
            for (long p = 1; p < PARTS; p++) w += part[p * head.codes + j];
            weight[j] = w;
            top[j] = f(top[j], w);
        }
    }
};

// log Z of a group's rows, SIDE of them next to each other; infinite where the largest term is, NaN where one is.
template <int SIDE, class T>
void log_partitions(const CodeLogits<T>& l, const Group& group, const Masses& masses, float* out) {
    constexpr long LANES = 16;  // lane k is of row k % SIDE
    const T* from = l.of(group);
    const long codes = l.head.codes, count = l.head.padded() * SIDE;
    std::vector<float> terms(count, -INFINITY);
    float* x = terms.data();
    for (long j = 0; j < codes; j++)
        for (int r = 0; r < SIDE; r++) x[j * SIDE + r] = (float)from[j * SIDE + r] + masses.top[j];
    float best[LANES], sum[LANES] = {};
    int undefined[LANES] = {};  // a NaN is larger than nothing
    std::fill(best, best + LANES, -INFINITY);
    for (long i = 0; i < count; i += LANES)
        for (int k = 0; k < LANES; k++) {
            best[k] = x[i + k] > best[k] ? x[i + k] : best[k];
            undefined[k] |= x[i + k] != x[i + k];
        }
    for (int k = SIDE; k < LANES; k++) {
        best[k % SIDE] = std::max(best[k % SIDE], best[k]);
        undefined[k % SIDE] |= undefined[k];
    }
    for (int k = SIDE; k < LANES; k++) best[k] = best[k % SIDE];
    for (long i = 0; i < count; i += LANES)
        for (int k = 0; k < LANES; k++) x[i + k] -= best[k];
    exponentials(x, count);
    for (long j = 0; j < codes; j++)
        for (int r = 0; r < SIDE; r++) x[j * SIDE + r] *= masses.weight[j];
    for (long i = 0; i < codes * SIDE; i += LANES)
        for (int k = 0; k < LANES; k++) sum[k] += x[i + k];
    for (int k = SIDE; k < LANES; k++) sum[k % SIDE] += sum[k];
    for (int r = 0; r < group.rows; r++)
        out[group.first + r] = undefined[r] ? NAN : std::isinf(best[r]) ? best[r] : logf(sum[r]) + best[r];
}

// Log Z of every row; with targets the loss of every row, 0 where the target is `ignored`.
template <class T>
bool losses(const Head& head, const T* h, const int64_t* target, float* out, long rows, long ignored, int threads) {
    bool good = true;
    Masses masses(head);
    for (long start = 0; start < rows; start += CHUNK) {
        const CodeLogits<T> l(head, std::min(CHUNK, rows - start));
#pragma omp parallel num_threads(threads) reduction(&& : good)
        {
            l.fill(h + start * head.given());
            if (start == 0) masses.count();
#pragma omp for schedule(static)
            for (long g = 0; g < (long)l.groups.size(); g++) {
                const Group& group = l.groups[g];
                (group.side == 1 ? log_partitions<1, T> : log_partitions<8, T>)(l, group, masses, out + start);
                for (long r = group.first; target != nullptr && r < group.first + group.rows; r++) {
                    const long token = target[start + r];
                    Codes code;
                    if (token == ignored) out[start + r] = 0;
                    else if (token < 0 || token >= head.tokens || !code.read(head, token, token + 1)) good = false;
                    else {
                        const float b = head.bias == nullptr ? 0.0f : head.bias[token];
                        out[start + r] -= (float)l.of(group)[code.code[0] * group.side + r - group.first] + b;
                    }
                }
            }
        }
    }
    return good && masses.good;
}

// -------------------------------------------------------------------------------------------------------------- top k

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

// The k largest first, no others.
void cut(std::vector<Candidate>& kept, long k) {
    if ((long)kept.size() <= k) return;
    std::nth_element(kept.begin(), kept.begin() + (k - 1), kept.end(), before);
    kept.resize(k);
}

// The k largest of some tokens for a row whose logits of two codes are `side` apart, in no order; all if there are fewer.
// Tokens come in order: one that only equals the k-th so far comes too late. False if a code is not in the codebook.
template <class T>
bool largest(const Head& head, const T* l, long side, long k, long start, long end, std::vector<Candidate>& kept) {
    constexpr long LOOK = 64;  // tokens of which mostly none is among the largest
    const long most = 2 * k + LOOK;
    kept.reserve(most + LOOK);
    Codes codes;
    float value[BLOCK], least = -INFINITY;
    bool full = false;
    for (; start < end; start += BLOCK) {
        if (!codes.read(head, start, end)) return false;
        const float* bias = head.bias == nullptr ? nullptr : head.bias + start;
        for (long i = 0; i < codes.count; i++) value[i] = (float)biased(l[codes.code[i] * side], bias, i);
        std::fill(value + codes.count, value + BLOCK, -INFINITY);
        for (long from = 0; from < codes.count; from += LOOK) {
            int any = !full;
            for (long i = from; i < from + LOOK; i++) any |= !(value[i] <= least);
            if (!any) continue;
            for (long i = from; i < std::min(from + LOOK, codes.count); i++)
                if (!full || !(value[i] <= least)) kept.push_back({value[i], (int32_t)(start + i)});
            if ((long)kept.size() < most) continue;
            cut(kept, k);
            least = kept[k - 1].value;
            full = true;
        }
    }
    cut(kept, k);
    return true;
}

template <class T>
bool topk(const Head& head, const T* h, T* values, int64_t* tokens, long rows, long k, int threads) {
    bool good = true;
    for (long start = 0; start < rows; start += CHUNK) {
        const long count = std::min(CHUNK, rows - start), shares = count < threads ? threads : 1;
        const CodeLogits<T> l(head, count);
        std::vector<std::vector<Candidate>> kept(count * shares);
#pragma omp parallel num_threads(threads) reduction(&& : good)
        {
            l.fill(h + start * head.given());
#pragma omp for schedule(static)
            for (long n = 0; n < count * shares; n++) {
                const long r = n / shares, share = n % shares;
                const auto has_r = [=](const Group& group) { return r < group.first + group.rows; };
                const Group& group = *std::find_if(l.groups.begin(), l.groups.end(), has_r);
                good = largest(head, l.of(group) + r - group.first, group.side, k, head.tokens * share / shares,
                               head.tokens * (share + 1) / shares, kept[n]) && good;
            }
#pragma omp for schedule(static)
            for (long r = 0; r < count; r++) {
                std::vector<Candidate>& all = kept[r * shares];
                for (long share = 1; share < shares; share++) {
                    const auto& other = kept[r * shares + share];
                    all.insert(all.end(), other.begin(), other.end());
                }
                cut(all, k);
                std::sort(all.begin(), all.end(), before);
                for (long i = 0; i < (long)all.size(); i++) {  // fewer than k only where a code was outside
                    values[(start + r) * k + i] = (T)all[i].value;
                    tokens[(start + r) * k + i] = all[i].token;
                }
            }
        }
    }
    return good;
}

}  // namespace

// h is [rows, width], or where there is no codebook its products with one, [rows, codes]; both in float, or if `narrow` in
// bfloat16. `outside` becomes 1 where a code or a target lies outside; the results are then not to be used.
extern "C" {

// Whether a codebook may be given.
void tiers_own_product(int* own) {
#ifdef OWN_PRODUCT
    *own = 1;
#else
    *own = 0;
#endif
}

// The code logits alone, which are dropped: to measure which product is faster.
void tiers_product(const Head* head, int narrow, const void* h, long rows, int threads, int* outside) {
    *outside = narrow ? !product(*head, (const BFloat*)h, rows, threads) : !product(*head, (const float*)h, rows, threads);
}

void tiers_logits(const Head* head, int narrow, const void* h, void* out, long rows, int threads, int* outside) {
    *outside = narrow ? !logits(*head, (const BFloat*)h, (BFloat*)out, rows, threads)
                      : !logits(*head, (const float*)h, (float*)out, rows, threads);
}

void tiers_losses(const Head* head, int narrow, const void* h, const int64_t* target, float* out, long rows, long ignored,
                  int threads, int* outside) {
    *outside = narrow ? !losses(*head, (const BFloat*)h, target, out, rows, ignored, threads)
                      : !losses(*head, (const float*)h, target, out, rows, ignored, threads);
}

void tiers_topk(const Head* head, int narrow, const void* h, void* values, int64_t* tokens, long rows, long k, int threads,
                int* outside) {
    *outside = narrow ? !topk(*head, (const BFloat*)h, (BFloat*)values, tokens, rows, k, threads)
                      : !topk(*head, (const float*)h, (float*)values, tokens, rows, k, threads);
}
}
