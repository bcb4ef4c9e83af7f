// Vectors of 16 floats, and bfloat16 in memory: what the C++ files here share.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

struct BF16 {
    uint16_t bits;
};

namespace {

constexpr int64_t LANES = 16;  // floats in a register

// ---- 16 numbers; beyond `count` nothing is written, and zeros are read --------------------------

__mmask16 first(int64_t count) {
    return count >= LANES ? 0xffff : (1 << std::max<int64_t>(count, 0)) - 1;
}

__m512 load(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first(count), from); }

__m512 load(const BF16* from, int64_t count) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

void store(float* to, int64_t count, __m512 x) { _mm512_mask_storeu_ps(to, first(count), x); }

void store(BF16* to, int64_t count, __m512 x) {
    _mm256_mask_storeu_epi16(to, first(count), (__m256i)_mm512_cvtneps_pbh(x));
}

// e^x = 2^n e^r with |r| <= ln(2) / 2, e^r by its series: relative error below 3e-7. NaN stays.
__m512 exp(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.f), _mm512_min_ps(_mm512_set1_ps(104.f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 sum = _mm512_set1_ps(1.f / 720);
    for (const float term : {1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f})
        sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(term));
    return _mm512_scalef_ps(sum, n);
}

__m512 silu(__m512 x) {
    const __m512 e = exp(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.f), e));
}

}  // namespace
