// The next token of every row in one call: guidance, temperature, softmax, inverse CDF.
//
// In PyTorch these are thirty short calls, and behind a step that has read all weights each of them
// begins in a cold cache: together they took a tenth of a step. generate/sampling.py says what is
// meant; rows that are greedy or leave codes out are drawn there.
//
// Legend: R rows, S steps, V logits of a row, K legal codes, which follow each other.

#include "native_vectors.h"

// What Python hands over: native.py has the same structure.
struct Draw {
    const BF16* logits;                         // (R, V)
    const int64_t* given;                       // (R,) or null: what is drawn already, or -1
    const int64_t* code_ids;                    // (K,)
    const int64_t *leader, *partner, *active;   // (R,)
    const float* temperature;                   // (R,)
    const int64_t* forced;                      // (R, S): the token that the format dictates, or -1
    const double* uniform;                      // (R, S)
    const float* scale;                         // (R, S)
    int64_t *step, *token;                      // (R,)
    int64_t* drawn;                             // (R, S)
    bool* finite;                               // (R,)
    int64_t rows, steps, width, first, codes;   // R, S, V, the first legal code's column, K
    int64_t threads;
};

namespace {

// unguided + scale (guided - unguided), the nearer end first, as torch.lerp. At 1 infinity stays.
__m512 guided(__m512 with, __m512 without, float scale) {
    if (scale == 1) return with;
    const __m512 apart = _mm512_sub_ps(with, without);
    if (scale < 0.5f) return _mm512_fmadd_ps(_mm512_set1_ps(scale), apart, without);
    return _mm512_fmadd_ps(_mm512_set1_ps(scale - 1), apart, with);
}

double sum(const float* from, int64_t count) {
    const __m512 x = load(from, count);
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    const __m256d upper = _mm512_extractf64x4_pd(_mm512_castps_pd(x), 1);
    const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(upper));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}

// Where the cumulative sum passes `uniform` times its end: never at a weight of zero. Sums of 16
// are looked through first. NaN: the last place.
int64_t passed(const std::vector<float>& weights, double uniform) {
    const int64_t codes = weights.size();
    std::vector<double> ends;
    double end = 0;
    for (int64_t k = 0; k < codes; k += LANES) ends.push_back(end += sum(&weights[k], codes - k));
    const double threshold = uniform * end;
    const int64_t block = std::upper_bound(ends.begin(), ends.end(), threshold) - ends.begin();
    if (block == (int64_t)ends.size()) return codes - 1;
    double before = block ? ends[block - 1] : 0;
    int64_t found = block * LANES;
    for (int64_t k = found; k < std::min(codes, (block + 1) * LANES); k++) {
        if (weights[k] > 0) found = k;  // the last of them, should the sum stop short by rounding
        if ((before += weights[k]) > threshold) break;
    }
    return found;
}

int64_t drawn(const Draw& d, int64_t row) {
    const BF16* with = d.logits + d.leader[row] * d.width + d.first;
    const BF16* without = d.logits + d.partner[row] * d.width + d.first;
    const int64_t entry = row * d.steps + d.step[row];
    const __m512 temperature = _mm512_set1_ps(d.temperature[row]);
    std::vector<float> weights(d.codes);
    __m512 largest = _mm512_set1_ps(-INFINITY);
    for (int64_t k = 0; k < d.codes; k += LANES) {
        const int64_t left = d.codes - k;
        __m512 x = guided(load(with + k, left), load(without + k, left), d.scale[entry]);
        x = _mm512_div_ps(x, temperature);
        store(&weights[k], left, x);
        largest = _mm512_mask_max_ps(largest, first(left), largest, x);
    }
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    bool fine = std::isfinite(_mm512_cvtss_f32(top));
    for (int64_t k = 0; k < d.codes; k += LANES) {
        const int64_t left = d.codes - k;
        const __m512 weight = exp(_mm512_sub_ps(load(&weights[k], left), top));
        fine = fine && !_mm512_mask_cmp_ps_mask(first(left), weight, weight, _CMP_UNORD_Q);
        store(&weights[k], left, weight);
    }
    d.finite[row] = d.finite[row] && fine;
    return passed(weights, d.uniform[entry]);
}

}  // namespace

extern "C" void draw(const Draw* asked) {
    const Draw& d = *asked;
    std::vector<int64_t> codes(d.rows, -1);
    if (d.given) codes.assign(d.given, d.given + d.rows);
#pragma omp parallel for schedule(static) num_threads(d.threads)
    for (int64_t row = 0; row < d.rows; row++)
        if (d.active[row] && d.leader[row] == row && codes[row] < 0) codes[row] = drawn(d, row);
    for (int64_t row = 0; row < d.rows; row++) {
        if (!d.active[row]) continue;
        const int64_t entry = row * d.steps + d.step[row], code = codes[d.leader[row]];
        d.drawn[entry] = code;
        d.token[row] = d.forced[entry] >= 0 ? d.forced[entry] : d.code_ids[code];
        d.step[row]++;
    }
}
