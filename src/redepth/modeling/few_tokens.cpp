// One block over few new tokens, from its first norm to its last sum, in one call: what `few_tokens.py` binds.
//
// At few tokens a block's time is that of reading its weights, so each is read once, straight into sums in fp32, and the
// small operations between the products are done by every thread for itself, which costs less than to wait for another.
// A result depends neither on the number of tokens in the call nor on the number of threads: each sum runs over its
// inputs in the same order.
//
// Shapes: M tokens of all rows, B rows, T tokens a row, D width, H query heads, G key/value heads, C channels of a head,
// K inputs and N outputs of a product, S stored and new tokens.

#include <omp.h>

#include "few_tokens_products.h"

namespace {

constexpr int KEYS_AT_ONCE = 256;
constexpr float NEVER = -1e30f;  // the score of a key that is not seen

struct Share {
    int64_t from, to;
    // This thread's part of n things, in whole vectors.
    explicit Share(int64_t n) {
        const int64_t vectors = (n + LANES - 1) / LANES, threads = omp_get_num_threads(), thread = omp_get_thread_num();
        from = std::min(n, vectors * thread / threads * LANES);
        to = std::min(n, vectors * (thread + 1) / threads * LANES);
    }
};

// ------------------------------------------------------------------------------------------------------------ a block

enum Placement : int32_t { PRE = 0, POST = 1, SANDWICH = 2, HUGINN = 3 };
enum Rope : int32_t { NO_ROPE = 0, HALVES = 1, INTERLEAVED = 2 };
enum HeadNorm : int32_t { NO_HEAD_NORM = 0, EACH_HEAD = 1, ALL_HEADS = 2 };

struct Layer {
    Matrix qkv, proj, fc, down;
    const float* norms[4];  // as `Block` numbers them
    const float *q_norm, *k_norm, *qk_bias;
    int32_t width, heads, kv_heads, head_dim, hidden;
    int32_t placement, one_plus, gelu, rope, rotated, head_norm;
    float eps, scaling, soft_cap;  // no soft cap: 0
};

struct Call {
    const float* x;  // [B, T, D]
    float* out;
    const float *cos, *sin;     // as `rotary.rotations` gives them, [B or 1, T, …]
    float *keys, *values;       // [all rows, G, at least S, C]
    const void* mask;           // [B or 1, 1, T, S], bytes or fp32 to be added; null where all is causal
    // Of tokens that do not simply follow the stored ones, with a mask: which rows of the cache theirs are, [B], where they go,
    // [B, T], and which are tokens at all; otherwise null.
    const int64_t *cache_rows, *places;
    const uint8_t* real;
    int64_t rows, tokens, past, stored, rope_row, row_stride, head_stride, mask_row, mask_token;
    int32_t mask_is_added, threads;
};

void rms_norm(const float* x, const float* weight, int64_t n, const Layer& layer, float* to) {
    const float scale = 1.0f / std::sqrt(dot(x, x, n) / n + layer.eps), plus = layer.one_plus ? 1.0f : 0.0f;
    apply(n, to, [&](int64_t i, int c) { return load_some(x + i, c) * scale * (load_some(weight + i, c) + plus); });
}

void activate(const float* gate, const float* up, int64_t n, bool gelu, float* to) {
    apply(n, to, [&](int64_t i, int c) {
        const Vec g = load_some(gate + i, c);
        // tanh's gelu is x times a sigmoid as well.
        const Vec inner = gelu ? 1.5957691216057308f * (g + 0.044715f * g * g * g) : g;
        return g / (1.0f + exponential(-inner)) * load_some(up + i, c);
    });
}

void turn(float* x, const float* cos, const float* sin, const Layer& layer) {
    const int half = layer.rotated / 2;
    if (layer.rope == HALVES)
        for (int i = 0; i < half; i++) {
            const float a = x[i], b = x[i + half];
            x[i] = b * sin[i] + a * cos[i];
            x[i + half] = a * sin[i + half] + b * cos[i + half];
        }
    else if (layer.rope == INTERLEAVED)
        for (int i = 0; i < half; i++) {
            const float a = x[2 * i], b = x[2 * i + 1];
            x[2 * i] = a * cos[i] - b * sin[i];
            x[2 * i + 1] = b * cos[i] + a * sin[i];
        }
}

int64_t row_of(const Call& call, int64_t b) { return call.cache_rows ? call.cache_rows[b] : b; }

// Norms, biases and turns of one token's queries and keys, in place; then its key and value go to the cache.
void place(const Layer& layer, const Call& call, int64_t b, int64_t t, float* qkv) {
    const int C = layer.head_dim, heads = layer.heads + layer.kv_heads;
    float* keys = qkv + int64_t(layer.heads) * C;
    const int per_angle = layer.rope == INTERLEAVED ? layer.rotated / 2 : layer.rotated;
    const int64_t angle = b * call.rope_row + t * per_angle;
    if (layer.head_norm == ALL_HEADS) {
        rms_norm(qkv, layer.q_norm, int64_t(layer.heads) * C, layer, qkv);
        rms_norm(keys, layer.k_norm, int64_t(layer.kv_heads) * C, layer, keys);
    }
    for (int h = 0; h < heads; h++) {
        float* head = qkv + int64_t(h) * C;
        if (layer.head_norm == EACH_HEAD) rms_norm(head, h < layer.heads ? layer.q_norm : layer.k_norm, C, layer, head);
        // Huginn's biases are there for as many key heads as query heads.
        if (layer.qk_bias) {
            const float* bias = layer.qk_bias + int64_t(h) * C;
            for (int i = 0; i < C; i++) head[i] += bias[i];
        }
        if (layer.rope != NO_ROPE) turn(head, call.cos + angle, call.sin + angle, layer);
    }
    if (call.real && !call.real[b * call.tokens + t]) return;
    const int64_t at = call.places ? call.places[b * call.tokens + t] : call.past + t;
    for (int g = 0; g < layer.kv_heads; g++) {
        const int64_t to = row_of(call, b) * call.row_stride + g * call.head_stride + at * C;
        std::memcpy(call.keys + to, keys + int64_t(g) * C, C * sizeof(float));
        std::memcpy(call.values + to, keys + int64_t(layer.kv_heads + g) * C, C * sizeof(float));
    }
}

// The sum of n rows of C numbers, each times its score, with the sums of a few columns at a time in registers.
void weigh(const float* scores, const float* rows, int n, int C, float* to) {
    int i = 0;
    for (; i + 4 * LANES <= C; i += 4 * LANES) {
        Vec total[4] = {};
        for (int s = 0; s < n; s++)
            for (int j = 0; j < 4; j++) total[j] += scores[s] * load(rows + int64_t(s) * C + i + j * LANES);
        for (int j = 0; j < 4; j++) store(to + i + j * LANES, total[j]);
    }
    for (; i < C; i += LANES) {
        const int count = std::min(LANES, C - i);
        Vec total{};
        for (int s = 0; s < n; s++) total += scores[s] * load_some(rows + int64_t(s) * C + i, count);
        for (int j = 0; j < count; j++) to[i + j] = total[j];
    }
}

// What the queries of one group and row make of a stretch of keys: for each query its largest score, the sum of the
// weights, and the weighted sum of the values (C numbers).
void read_keys(const Layer& layer, const Call& call, int64_t b, int g, int64_t from, int64_t to, const float* qkv, int64_t ldq,
               float* parts) {
    const int C = layer.head_dim, each = layer.heads / layer.kv_heads;
    const int64_t base = row_of(call, b) * call.row_stride + g * call.head_stride;
    float scores[KEYS_AT_ONCE];
    for (int64_t t = 0; t < call.tokens; t++) {
        const int64_t seen = std::min(to, call.mask ? to : call.past + t + 1);
        const int64_t masked = b * call.mask_row + t * call.mask_token + from;
        const uint8_t* seen_bytes = call.mask_is_added ? nullptr : (const uint8_t*)call.mask;
        const float* addition = call.mask_is_added ? (const float*)call.mask : nullptr;
        for (int e = 0; e < each; e++) {
            const float* query = qkv + (b * call.tokens + t) * ldq + int64_t(g * each + e) * C;
            float* part = parts + (t * each + e) * (C + 2);
            const int n = int(std::max<int64_t>(seen - from, 0));
            float largest = NEVER;
            for (int s = 0; s < n; s++) {
                float score = dot(query, call.keys + base + (from + s) * C, C) * layer.scaling;
                if (layer.soft_cap > 0) score = layer.soft_cap * std::tanh(score / layer.soft_cap);
                if (seen_bytes && !seen_bytes[masked + s]) score = NEVER;
                if (addition) score = std::max(NEVER, score + addition[masked + s]);
                scores[s] = score;
                largest = std::max(largest, score);
            }
            apply(n, scores, [&](int64_t i, int c) { return exponential(load_some(scores + i, c) - largest); });
            part[0] = largest;
            part[1] = 0;
            for (int s = 0; s < n; s++) part[1] += scores[s];
            weigh(scores, call.values + base + from * C, n, C, part + 2);
        }
    }
}

// Joins what one head of one token read in the stretches of keys.
void join(const float* parts, int64_t stretches, int64_t apart, int C, float* to) {
    float largest = NEVER, weights = 0;
    for (int64_t i = 0; i < stretches; i++) largest = std::max(largest, parts[i * apart]);
    std::fill(to, to + C, 0.0f);
    for (int64_t i = 0; i < stretches; i++) {
        const float* part = parts + i * apart;
        if (part[1] == 0) continue;
        const float share = std::exp(part[0] - largest);
        weights += share * part[1];
        for (int j = 0; j < C; j++) to[j] += share * part[2 + j];
    }
    for (int j = 0; j < C; j++) to[j] /= weights;
}

// x + f(x) with the family's norms around it: `before` is what f reads, `after` the sum.
void before(const Layer& layer, int which, const float* x, int64_t M, float* to) {
    const int64_t D = layer.width;
    const bool normed = layer.placement != POST;
    const float* weight = layer.norms[layer.placement == PRE ? which : 2 * which];
    for (int64_t m = 0; m < M; m++)
        if (normed) rms_norm(x + m * D, weight, D, layer, to + m * D);
        else std::memcpy(to + m * D, x + m * D, D * sizeof(float));
}
void after(const Layer& layer, int which, const float* x, const float* added, int64_t m, float* to) {
    const int64_t D = layer.width;
    const float* weight = layer.norms[layer.placement == POST ? which : 2 * which + 1];
    float* out = to + m * D;
    auto plus = [&](const float* a, const float* b) {
        apply(D, out, [&](int64_t i, int c) { return load_some(a + i, c) + load_some(b + i, c); });
    };
    if (layer.placement == PRE) return plus(x + m * D, added + m * D);
    if (layer.placement == HUGINN) {
        plus(x + m * D, added + m * D);
        return rms_norm(out, weight, D, layer, out);
    }
    static thread_local std::vector<float> held;
    float* normed = room(held, D);
    rms_norm(added + m * D, weight, D, layer, normed);
    plus(x + m * D, normed);
}

}  // namespace

extern "C" void redepth_linear(const Matrix* w, const float* x, int64_t M, float* y, int32_t threads) {
#pragma omp parallel num_threads(threads)
    {
        const Share share(w->outputs);
        multiply(*w, share.from, share.to, inputs_of(*w, x, M), M, y, w->outputs);
    }
}

extern "C" void redepth_block(const Layer* held_layer, const Call* held_call) {
    const Layer& layer = *held_layer;
    const Call& call = *held_call;
    const int64_t M = call.rows * call.tokens, D = layer.width, I = layer.hidden, C = layer.head_dim;
    const int64_t S = call.stored, stretches = (S + KEYS_AT_ONCE - 1) / KEYS_AT_ONCE;
    const int64_t N = layer.qkv.outputs, each = layer.heads / layer.kv_heads;
    const int64_t of_task = call.tokens * each * (C + 2), tasks = call.rows * layer.kv_heads * stretches;
    static thread_local std::vector<float> shared;
    float* qkv = room(shared, M * (N + 2 * I + 2 * D) + tasks * of_task);
    float *gate = qkv + M * N, *up = gate + M * I, *mixed = up + M * I, *added = mixed + M * D, *parts = added + M * D;
#pragma omp parallel num_threads(call.threads)
    {
        static thread_local std::vector<float> own;
        const int64_t widest = std::max(D, layer.heads * C);
        float* inputs = room(own, M * (widest + D));
        float* x = inputs + M * widest;
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();

        before(layer, 0, call.x, M, inputs);
        const Share heads(N), width(D), hidden(I);
        multiply(layer.qkv, heads.from, heads.to, inputs_of(layer.qkv, inputs, M), M, qkv, N);
#pragma omp barrier
        for (int64_t m = thread; m < M; m += threads) place(layer, call, m / call.tokens, m % call.tokens, qkv + m * N);
#pragma omp barrier
        for (int64_t task = thread; task < tasks; task += threads) {
            const int64_t from = task % stretches * KEYS_AT_ONCE, group = task / stretches;
            read_keys(layer, call, group / layer.kv_heads, int(group % layer.kv_heads), from,
                      std::min(S, from + KEYS_AT_ONCE), qkv, N, parts + task * of_task);
        }
#pragma omp barrier
        for (int64_t m = 0; m < M; m++)
            for (int64_t h = 0; h < layer.heads; h++) {
                const int64_t group = m / call.tokens * layer.kv_heads + h / each;
                const float* part = parts + group * stretches * of_task + (m % call.tokens * each + h % each) * (C + 2);
                join(part, stretches, of_task, int(C), inputs + m * layer.heads * C + h * C);
            }
        multiply(layer.proj, width.from, width.to, inputs_of(layer.proj, inputs, M), M, mixed, D);
#pragma omp barrier
        for (int64_t m = 0; m < M; m++) after(layer, 0, call.x, mixed, m, x);
        before(layer, 1, x, M, inputs);
        const Inputs both = inputs_of(layer.fc, inputs, M);
        multiply(layer.fc, hidden.from, hidden.to, both, M, gate, I);
        multiply(layer.fc, I + hidden.from, I + hidden.to, both, M, up - I, I);
        for (int64_t m = 0; m < M; m++) {
            const int64_t at = m * I + hidden.from;
            activate(gate + at, up + at, hidden.to - hidden.from, layer.gelu, gate + at);
        }
#pragma omp barrier
        multiply(layer.down, width.from, width.to, inputs_of(layer.down, gate, M), M, added, D);
#pragma omp barrier
        for (int64_t m = thread; m < M; m += threads) after(layer, 1, x, added, m, call.out);
    }
}
