// Decode steps on a CPU at memory's speed: a product, and LlamaGen's step in one call, in bfloat16.
//
// A step of a few rows takes as long as its weights take to be read. They are packed so that each
// thread reads a stretch of memory from front to back, and what comes in between (norms, rotations,
// attention, activations) is short. For processors with AVX-512 and its bfloat16 products;
// native.py compiles, loads and calls it.
//
// Sums are in float32 and in an order that depends on nothing but their own length: not on the
// other rows, not on the number of rows or threads. Each result is rounded once.
//
// Legend: R rows of a cache, T tokens of each, N = R T, D inputs or model width, E outputs, F width
// inside the feed-forward layers, C columns, H heads, J heads of keys, w a head's width.

#include "native_vectors.h"

// ---- what Python hands over: native.py has the same structures ----------------------------------

struct Matrix {
    const char* words;  // by groups of 32 outputs; in a group by words: two inputs of each output
    const BF16* bias;   // (E,) or null
    int64_t inputs, outputs;
};

struct Layer {
    const BF16 *attention_norm, *mlp_norm;  // (D,)
    Matrix qkv, out, gate, up, down;
};

struct Model {
    const Layer* layers;
    const BF16* norm;    // (D,)
    const float* turns;  // (C, w): cosine and sine of each pair
    int64_t depth, width, heads, key_heads, head_width;
    double epsilon;
};

struct Pass {
    BF16* x;                            // (N, D): embeddings; then the final hidden states
    const int64_t* columns;             // (N,): where each token stands
    const uint8_t* hidden;              // (R, C) or null: columns that only their own token sees
    BF16 *const *keys, *const *values;  // (R, J, C, w) of each layer
    int64_t rows, tokens, capacity;     // R, T, C
    int64_t threads;
};

namespace {

constexpr int64_t GROUP = 2 * LANES;  // outputs that are packed together
constexpr int64_t ROWS = 8;           // at a time: their sums fill 16 of 32 registers

// ---- products: all threads call these, each does its share --------------------------------------

struct Sums {
    __m512 of[ROWS][2];  // a group's outputs, of some rows
};

template <int64_t N>
void sum_rows(const Matrix& m, const BF16* x, int64_t group, Sums& sums) {
    const int64_t words = m.inputs / 2, at = group * GROUP, count = m.outputs - at;
    const char* weight = m.words + at * words * 4;
    const int* x_words = (const int*)x;
    __m512 left[N], right[N];
    for (int64_t n = 0; n < N; n++) {
        left[n] = m.bias ? load(m.bias + at, count) : _mm512_setzero_ps();
        right[n] = m.bias ? load(m.bias + at + LANES, count - LANES) : _mm512_setzero_ps();
    }
    for (int64_t word = 0; word < words; word++, weight += GROUP * 4) {
        const __m512bh a = (__m512bh)_mm512_loadu_si512(weight);
        const __m512bh b = (__m512bh)_mm512_loadu_si512(weight + 64);
#pragma GCC unroll 8
        for (int64_t n = 0; n < N; n++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(x_words[n * words + word]);
            left[n] = _mm512_dpbf16_ps(left[n], a, pair);
            right[n] = _mm512_dpbf16_ps(right[n], b, pair);
        }
    }
    for (int64_t n = 0; n < N; n++) {
        sums.of[n][0] = left[n];
        sums.of[n][1] = right[n];
    }
}

void sum(const Matrix& m, const BF16* x, int64_t rows, int64_t group, Sums& sums) {
    using Sum = void (*)(const Matrix&, const BF16*, int64_t, Sums&);
    static constexpr Sum of[] = {sum_rows<1>, sum_rows<2>, sum_rows<3>, sum_rows<4>,
                                 sum_rows<5>, sum_rows<6>, sum_rows<7>, sum_rows<8>};
    of[rows - 1](m, x, group, sums);
}

// For each group of outputs and each few rows: `work(group, first row, how many)`. A group's
// weights stay in the cache from some rows to the next.
template <class Work>
void tiles(const Matrix& m, int64_t rows, Work work) {
    const int64_t groups = (m.outputs + GROUP - 1) / GROUP;
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; group++)
        for (int64_t row = 0; row < rows; row += ROWS) work(group, row, std::min(ROWS, rows - row));
}

// out_NE = x_ND weight_DE + bias_E, and added to what is there if `add`.
void multiply(const Matrix& m, const BF16* x, BF16* out, int64_t rows, bool add) {
    tiles(m, rows, [&](int64_t group, int64_t row, int64_t count) {
        Sums sums;
        sum(m, x + row * m.inputs, count, group, sums);
        for (int64_t n = 0; n < count; n++)
            for (int64_t half = 0; half < 2; half++) {
                const int64_t at = group * GROUP + half * LANES, left = m.outputs - at;
                BF16* to = out + (row + n) * m.outputs + at;
                const __m512 made = sums.of[n][half];
                store(to, left, add ? _mm512_add_ps(made, load(to, left)) : made);
            }
    });
}

// out_NF = silu(x_ND gate_DF) * (x_ND up_DF)
void multiply_gated(const Matrix& gate, const Matrix& up, const BF16* x, BF16* out, int64_t rows) {
    tiles(gate, rows, [&](int64_t group, int64_t row, int64_t count) {
        Sums gates, ups;
        sum(gate, x + row * gate.inputs, count, group, gates);
        sum(up, x + row * up.inputs, count, group, ups);
        for (int64_t n = 0; n < count; n++)
            for (int64_t half = 0; half < 2; half++) {
                const int64_t at = group * GROUP + half * LANES;
                const __m512 made = _mm512_mul_ps(silu(gates.of[n][half]), ups.of[n][half]);
                store(out + (row + n) * gate.outputs + at, gate.outputs - at, made);
            }
    });
}

// ---- RMSNorm ------------------------------------------------------------------------------------

void norm(const BF16* x, const BF16* weight, BF16* out, int64_t rows, int64_t width,
          float epsilon) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const BF16* from = x + row * width;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += LANES) {
            const __m512 part = load(from + i, width - i);
            squares = _mm512_fmadd_ps(part, part, squares);
        }
        const float mean = _mm512_reduce_add_ps(squares) / width;
        const __m512 scale = _mm512_set1_ps(1.f / std::sqrt(mean + epsilon));
        for (int64_t i = 0; i < width; i += LANES) {
            const __m512 unit = _mm512_mul_ps(load(from + i, width - i), scale);
            const __m512 made = _mm512_mul_ps(unit, load(weight + i, width - i));
            store(out + row * width + i, width - i, made);
        }
    }
}

// ---- attention ----------------------------------------------------------------------------------

// Turns neighbouring pairs by the angles of a column.
template <class To>
void turn(const BF16* from, const float* turns, To* to, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) {
        const __m512 x = load(from + i, width - i), turned = load(turns + i, width - i);
        const __m512 across = _mm512_mul_ps(_mm512_permute_ps(x, 0xb1), _mm512_movehdup_ps(turned));
        store(to + i, width - i, _mm512_fmaddsub_ps(x, _mm512_moveldup_ps(turned), across));
    }
}

// One query over the first `seen` columns: softmax of the scores, then the values' sum. A head is
// PARTS registers wide, the last perhaps not full.
template <int64_t PARTS>
void attend(const float* query, const BF16* keys, const BF16* values, const uint8_t* hidden,
            int64_t seen, int64_t width, float* weights, BF16* out) {
    const auto part = [width](const auto* from, int64_t number) {
        const int64_t at = number * LANES;
        return load(from + at, number + 1 < PARTS ? LANES : width - at);
    };
    __m512 queries[PARTS], mixed[PARTS], total = _mm512_setzero_ps();
    for (int64_t i = 0; i < PARTS; i++) {
        queries[i] = part(query, i);
        mixed[i] = _mm512_setzero_ps();
    }
    const float scale = 1.f / std::sqrt((float)width);
    float largest = -INFINITY;
    for (int64_t c = 0; c < seen; c++) {
        __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int64_t i = 0; i < PARTS; i++)
            sum = _mm512_fmadd_ps(queries[i], part(keys + c * width, i), sum);
        const bool unseen = hidden && hidden[c] && c + 1 < seen;
        weights[c] = unseen ? -INFINITY : scale * _mm512_reduce_add_ps(sum);
        largest = std::max(largest, weights[c]);
    }
    for (int64_t c = 0; c < seen; c += LANES) {
        const __m512 below = _mm512_sub_ps(load(weights + c, seen - c), _mm512_set1_ps(largest));
        const __m512 weight = _mm512_maskz_mov_ps(first(seen - c), exp(below));
        store(weights + c, seen - c, weight);
        total = _mm512_add_ps(total, weight);
    }
    for (int64_t c = 0; c < seen; c++)
#pragma GCC unroll 8
        for (int64_t i = 0; i < PARTS; i++) {
            const __m512 value = part(values + c * width, i);
            mixed[i] = _mm512_fmadd_ps(_mm512_set1_ps(weights[c]), value, mixed[i]);
        }
    total = _mm512_set1_ps(_mm512_reduce_add_ps(total));
    for (int64_t i = 0; i < PARTS; i++)
        store(out + i * LANES, width - i * LANES, _mm512_div_ps(mixed[i], total));
}

using Attend = void (*)(const float*, const BF16*, const BF16*, const uint8_t*, int64_t, int64_t,
                        float*, BF16*);
constexpr Attend attend_parts[] = {attend<1>, attend<2>, attend<3>, attend<4>,
                                   attend<5>, attend<6>, attend<7>, attend<8>};

// (N, H + 2 J, w) to (N, H, w). What belongs to one head of keys of one row is one thread's: it
// keeps the fresh keys and values of its tokens, then its queries attend.
void attention(const Model& m, const Pass& p, int64_t layer, const BF16* qkv, BF16* mixed) {
    const int64_t w = m.head_width, group = m.heads / m.key_heads;
    const int64_t all = (m.heads + 2 * m.key_heads) * w;
    std::vector<float> query(w), weights(p.capacity);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < p.rows * m.key_heads; task++) {
        const int64_t row = task / m.key_heads, key_head = task % m.key_heads;
        const int64_t start = row * p.tokens, end = start + p.tokens;
        BF16* keys = p.keys[layer] + task * p.capacity * w;
        BF16* values = p.values[layer] + task * p.capacity * w;
        const uint8_t* hidden = p.hidden ? p.hidden + row * p.capacity : nullptr;
        for (int64_t n = start; n < end; n++) {
            const BF16* key = qkv + n * all + (m.heads + key_head) * w;
            const BF16* value = key + m.key_heads * w;
            turn(key, m.turns + p.columns[n] * w, keys + p.columns[n] * w, w);
            std::copy(value, value + w, values + p.columns[n] * w);
        }
        for (int64_t n = start; n < end; n++)
            for (int64_t head = key_head * group; head < (key_head + 1) * group; head++) {
                turn(qkv + n * all + head * w, m.turns + p.columns[n] * w, query.data(), w);
                attend_parts[(w - 1) / LANES](query.data(), keys, values, hidden, p.columns[n] + 1,
                                              w, weights.data(), mixed + (n * m.heads + head) * w);
            }
    }
}

}  // namespace

// ---- what Python calls --------------------------------------------------------------------------

extern "C" void product(const Matrix* m, const BF16* x, BF16* out, int64_t rows, int64_t threads) {
#pragma omp parallel num_threads(threads)
    multiply(*m, x, out, rows, false);
}

extern "C" void step(const Model* model, const Pass* pass) {
    const Model& m = *model;
    const Pass& p = *pass;
    const int64_t rows = p.rows * p.tokens;
    const Layer& any = m.layers[0];
    std::vector<BF16> unit(rows * m.width), qkv(rows * any.qkv.outputs);
    std::vector<BF16> mixed(rows * any.out.inputs), inside(rows * any.down.inputs);
#pragma omp parallel num_threads(p.threads)
    {
        for (int64_t i = 0; i < m.depth; i++) {
            const Layer& layer = m.layers[i];
            norm(p.x, layer.attention_norm, unit.data(), rows, m.width, m.epsilon);
            multiply(layer.qkv, unit.data(), qkv.data(), rows, false);
            attention(m, p, i, qkv.data(), mixed.data());
            multiply(layer.out, mixed.data(), p.x, rows, true);
            norm(p.x, layer.mlp_norm, unit.data(), rows, m.width, m.epsilon);
            multiply_gated(layer.gate, layer.up, unit.data(), inside.data(), rows);
            multiply(layer.down, inside.data(), p.x, rows, true);
        }
        norm(p.x, m.norm, p.x, rows, m.width, m.epsilon);
    }
}
