// From the rows of the q|k|v product to rotated queries and the paged cache, in one launch, one block per row.
#include "common.cuh"

enum QkNorm { NONE, FULL, HEAD };

struct Rope {
    const T *qkv_tx;
    T *q_thc, *k_phoc, *v_phoc;
    const int *position_t, *slot_t, *page_sp, *rows;
    const float *cos_pc, *sin_pc, *q_norm, *k_norm, *bias_x;
    int most, heads, kv_heads, head_dim, page_tokens, pages;  // pages: of a sequence, at most
    int qk_norm, lanes;  // lanes: threads per head, a power of two up to 32
    float eps, clip, scale;
};

// V values of T as fp32, 16 bytes at once where V is 8.
template <int V>
__device__ __forceinline__ void load(const T *from, float (&to)[V]) {
    if constexpr (V == 8) {
        Eight v;
        v.bits = *reinterpret_cast<const uint4 *>(from);
#pragma unroll
        for (int i = 0; i < 8; i++) to[i] = to_float(v.t[i]);
    } else {
        to[0] = to_float(from[0]);
    }
}

template <int V>
__device__ __forceinline__ void load(const float *from, float (&to)[V]) {
    if constexpr (V == 8) {
        const float4 low = reinterpret_cast<const float4 *>(from)[0], high = reinterpret_cast<const float4 *>(from)[1];
        to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
        to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
    } else {
        to[0] = from[0];
    }
}

template <int V>
__device__ __forceinline__ void store(T *to, const float (&from)[V]) {
    if constexpr (V == 8) {
        Eight v;
#pragma unroll
        for (int i = 0; i < 8; i++) v.t[i] = to_t(from[i]);
        *reinterpret_cast<uint4 *>(to) = v.bits;
    } else {
        to[0] = to_t(from[0]);
    }
}

// x = x * factor * weight of V columns.
template <int V>
__device__ __forceinline__ void scaled(float (&x)[V], float factor, const float *weight) {
    float w[V];
    load(weight, w);
#pragma unroll
    for (int i = 0; i < V; i++) x[i] = x[i] * factor * w[i];
}

// Columns c.. of a row of the product, with the bias.
template <int V>
__device__ __forceinline__ void load_biased(const Rope &p, const T *qkv_x, int c, float (&x)[V]) {
    load(qkv_x + c, x);
    if (!p.bias_x) return;
    float bias[V];
    load(p.bias_x + c, bias);
#pragma unroll
    for (int i = 0; i < V; i++) x[i] += bias[i];
}

__device__ __forceinline__ float rms_factor(float sum, int width, float eps) {
    return 1.0f / sqrtf(sum / float(width) + eps);
}

// The pairs (a, b) turned by their angles, times scale.
template <int V>
__device__ __forceinline__ void turn(float (&a)[V], float (&b)[V], const float *cos_c, const float *sin_c,
                                     float scale) {
    float cos[V], sin[V];
    load(cos_c, cos);
    load(sin_c, sin);
#pragma unroll
    for (int i = 0; i < V; i++) {
        const float first = (a[i] * cos[i] - b[i] * sin[i]) * scale;
        b[i] = (b[i] * cos[i] + a[i] * sin[i]) * scale;
        a[i] = first;
    }
}

__device__ __forceinline__ float clipped(float x, float clip) {  // a NaN stays one
    return x > clip ? clip : x < -clip ? -clip : x;
}

// RMS factors over all of q (.x) and all of k (.y). The second reading of the row comes out of L1.
template <int V>
__device__ __forceinline__ float2 full_factors(const Rope &p, const T *qkv_x) {
    __shared__ float part[2][32];
    const int q_width = p.heads * p.head_dim, k_width = p.kv_heads * p.head_dim;
    float q_sum = 0.0f, k_sum = 0.0f;
    for (int c = threadIdx.x * V; c < q_width + k_width; c += blockDim.x * V) {
        float x[V], sum = 0.0f;
        load_biased(p, qkv_x, c, x);
#pragma unroll
        for (int i = 0; i < V; i++) sum += x[i] * x[i];
        (c < q_width ? q_sum : k_sum) += sum;
    }
    q_sum = sum_over_block(q_sum, part[0]);
    return make_float2(rms_factor(q_sum, q_width, p.eps), rms_factor(sum_over_block(k_sum, part[1]), k_width, p.eps));
}

// A head per group of `lanes` threads; a thread holds N times V pairs (i, i + head_dim / 2) of it.
template <int V, int N>
__device__ __forceinline__ void rope_row(const Rope &p) {
    const int row = blockIdx.x;
    if (row >= row_count(p.rows, p.most)) return;
    const int half = p.head_dim / 2, all = p.heads + 2 * p.kv_heads;
    const T *qkv_x = p.qkv_tx + size_t(row) * all * p.head_dim;
    const int position = p.position_t[row];
    const int page = p.page_sp[size_t(p.slot_t[row]) * p.pages + position / p.page_tokens];
    const float2 full = p.qk_norm == FULL ? full_factors<V>(p, qkv_x) : make_float2(1.0f, 1.0f);
    const int lane = threadIdx.x % p.lanes, groups = blockDim.x / p.lanes;
    for (int first = 0; first < all; first += groups) {  // as often in every thread: they shuffle
        const int head = first + threadIdx.x / p.lanes;
        const bool is_q = head < p.heads, is_v = head >= p.heads + p.kv_heads;
        const float *weight = is_q ? p.q_norm : p.k_norm;
        float a[N][V], b[N][V], sum = 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int i = (lane + n * p.lanes) * V, c = head * p.head_dim + i;
            if (head >= all || i >= half) continue;
            load_biased(p, qkv_x, c, a[n]);
            load_biased(p, qkv_x, c + half, b[n]);
            if (p.qk_norm == FULL && !is_v) {
                const float *w = weight + (is_q ? c : c - p.heads * p.head_dim);
                scaled(a[n], is_q ? full.x : full.y, w);
                scaled(b[n], is_q ? full.x : full.y, w + half);
            }
#pragma unroll
            for (int v = 0; v < V; v++) {
                if (p.clip > 0.0f) a[n][v] = clipped(a[n][v], p.clip), b[n][v] = clipped(b[n][v], p.clip);
                sum += a[n][v] * a[n][v] + b[n][v] * b[n][v];
            }
        }
        if (p.qk_norm == HEAD)
            for (int step = p.lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        T *to = p.q_thc + (size_t(row) * p.heads + head) * p.head_dim;
        if (!is_q) {
            const size_t line = size_t(page) * p.kv_heads + (head - p.heads) % p.kv_heads;
            to = (is_v ? p.v_phoc : p.k_phoc) + (line * p.page_tokens + position % p.page_tokens) * p.head_dim;
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int i = (lane + n * p.lanes) * V;
            if (head >= all || i >= half) continue;
            if (!is_v) {
                if (p.qk_norm == HEAD) {
                    const float factor = rms_factor(sum, p.head_dim, p.eps);
                    scaled(a[n], factor, weight + i);
                    scaled(b[n], factor, weight + half + i);
                }
                turn(a[n], b[n], p.cos_pc + size_t(position) * half + i, p.sin_pc + size_t(position) * half + i,
                     is_q ? p.scale : 1.0f);
            }
            store(to + i, a[n]);
            store(to + half + i, b[n]);
        }
    }
}

#define ROPE_PARAMETERS                                                                                              \
    const T *qkv_tx, T *q_thc, T *k_phoc, T *v_phoc, const int *position_t, const int *slot_t, const int *page_sp,  \
        const int *rows, const float *cos_pc, const float *sin_pc, const float *q_norm, const float *k_norm,        \
        const float *bias_x, int most, int heads, int kv_heads, int head_dim, int page_tokens, int pages,           \
        int qk_norm, int lanes, float eps, float clip, float scale
#define ROPE_ARGUMENTS                                                                                               \
    qkv_tx, q_thc, k_phoc, v_phoc, position_t, slot_t, page_sp, rows, cos_pc, sin_pc, q_norm, k_norm, bias_x, most,  \
        heads, kv_heads, head_dim, page_tokens, pages, qk_norm, lanes, eps, clip, scale

// head_dim is a multiple of 16, at most 256.
extern "C" __global__ void __launch_bounds__(512) rope_8(ROPE_PARAMETERS) { rope_row<8, 1>(Rope{ROPE_ARGUMENTS}); }

// head_dim is even, at most 256.
extern "C" __global__ void __launch_bounds__(512) rope_1(ROPE_PARAMETERS) { rope_row<1, 4>(Rope{ROPE_ARGUMENTS}); }
