// The router: scores, choice and weights of each row's experts, and how many rows each expert has
// in each block of rows. One warp per row; lane l holds experts l, l + 32, ... in registers.
//
// Choices compare as unsigned keys of the same order as the floats, so that one warp instruction
// finds the largest and another the lowest index that has it.
#include "common.cuh"

#define ALL 0xffffffffu

enum Score { SOFTMAX_ALL, SOFTMAX_SELECTED, SIGMOID, SPARSEMIXER };

// Larger floats have larger keys; -0 is 0, as in a comparison, and NaN is above all, where NumPy's argmax
// finds it. A place without an expert has key 0, below that of -inf.
#define KEY_MINUS_INF 0x007fffffu
__device__ __forceinline__ unsigned key_of(float x) {
    if (x != x) return ALL;
    const unsigned bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(unsigned key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ float max_over_warp(float x) { return value_of(__reduce_max_sync(ALL, key_of(x))); }

// The index of the warp's largest key, the lowest among equals; `top` becomes that key.
template <int N> __device__ __forceinline__ int argmax(const unsigned (&key)[N], int lane, unsigned &top) {
    unsigned best = 0, at = lane;
#pragma unroll
    for (int j = 0; j < N; j++)
        if (key[j] > best) best = key[j], at = lane + 32 * j;
    top = __reduce_max_sync(ALL, best);
    return __reduce_min_sync(ALL, best == top ? at : ALL);
}

// Keys of experts outside the best groups become that of -inf. A group scores by the sum of its two
// best choices, NaN last. `choice` is the warp's own shared memory, a float per expert.
template <int N>
__device__ __forceinline__ void best_groups(unsigned (&key)[N], float *choice, int lane, int experts, int groups,
                                            int top_groups) {
    const int size = experts / groups;
#pragma unroll
    for (int j = 0; j < N; j++)
        if (lane + 32 * j < experts) choice[lane + 32 * j] = value_of(key[j]);
    __syncwarp();
    unsigned group_key[N], kept = 0, top;
#pragma unroll
    for (int j = 0; j < N; j++) {
        const int g = lane + 32 * j;
        group_key[j] = 0;
        if (g >= groups) continue;
        float first = MINUS_INF, second = MINUS_INF;
        int numbers = 0;
        // Each lane starts at another place of its group: all lanes at the start would meet in one bank.
        for (int i = 0, at = g % size; i < size; i++, at = at + 1 == size ? 0 : at + 1) {
            const float v = choice[g * size + at];
            numbers += v == v;
            if (v > first) second = first, first = v;
            else if (v > second) second = v;
        }
        const float sum = size > 1 ? first + second : first;
        group_key[j] = key_of(numbers < min(2, size) ? __int_as_float(0x7fffffff) : sum);
    }
    for (int i = 0; i < top_groups; i++) {
        const int g = argmax(group_key, lane, top);
#pragma unroll
        for (int j = 0; j < N; j++)
            if (g == lane + 32 * j) group_key[j] = KEY_MINUS_INF, kept |= 1u << j;
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
        const int g = (lane + 32 * j) / size;
        const unsigned bits = __shfl_sync(ALL, kept, g & 31);
        if (key[j] && !(bits >> (g >> 5) & 1)) key[j] = KEY_MINUS_INF;
    }
    __syncwarp();  // `choice` is written again for the next row
}

// SparseMixer's weight of the best expert: its softmax over those within a relative distance of `distance`.
template <int N>
__device__ __forceinline__ float sparse_weight(const float (&logit)[N], const unsigned (&key)[N], float top,
                                               float distance) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < N; j++) {
        const float size = fmaxf(fmaxf(fabsf(logit[j]), top), 1e-30f);
        const bool far = (top - logit[j]) / size > distance;
        sum += !key[j] || far ? 0.0f : expf(value_of(key[j]) - top);
    }
    return 1.0f / sum_over_warp(sum);
}

// score: logits in, scores out. key: of the choices, which a bias moves.
template <int N>
__device__ __forceinline__ void scores(float (&score)[N], unsigned (&key)[N], const float *bias_e, int lane,
                                       int experts, int kind) {
    if (kind == SIGMOID) {
#pragma unroll
        for (int j = 0; j < N; j++) score[j] = 1.0f / (1.0f + expf(-score[j]));
    } else if (kind == SOFTMAX_ALL) {
        float top = score[0], sum = 0.0f;
#pragma unroll
        for (int j = 1; j < N; j++) top = fmaxf(top, score[j]);
        top = max_over_warp(top);
#pragma unroll
        for (int j = 0; j < N; j++) sum += lane + 32 * j < experts ? score[j] = expf(score[j] - top) : 0.0f;
        sum = sum_over_warp(sum);
#pragma unroll
        for (int j = 0; j < N; j++) score[j] /= sum;
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
        const int e = lane + 32 * j;
        const bool biased = bias_e && kind != SPARSEMIXER;
        key[j] = e < experts ? key_of(biased ? score[j] + bias_e[e] : score[j]) : 0;
    }
}

// hist_be is written whole: a block of rows that are not there counts 0 of each expert.
#define PARAMETERS                                                                                              \
    const float *logit_te, const float *bias_e, int *expert_tk, float *weight_tk, int *hist_be, const int *rows, \
        int most, int rows_per_block, int experts, int k, int kind, int groups, int top_groups, int renormalise, \
        float scale, float distance
#define ARGUMENTS                                                                                             \
    logit_te, bias_e, expert_tk, weight_tk, hist_be, rows, most, rows_per_block, experts, k, kind, groups,    \
        top_groups, renormalise, scale, distance

template <int N> __device__ __forceinline__ void route_rows(PARAMETERS) {
    CUDACPU_DYNAMIC_SHARED(int, shared);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    int *hist_e = shared;
    float *choice = reinterpret_cast<float *>(shared + experts * (1 + warp));
    for (int e = threadIdx.x; e < experts; e += blockDim.x) hist_e[e] = 0;
    __syncthreads();
    const int first = blockIdx.x * rows_per_block;
    const int end = min(first + rows_per_block, row_count(rows, most));
    for (int t = first + warp; t < end; t += warps) {
        float score[N];
        unsigned key[N], top;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const int e = lane + 32 * j;
            score[j] = e < experts ? logit_te[(size_t)t * experts + e] : MINUS_INF;
        }
        scores(score, key, bias_e, lane, experts, kind);
        if (groups > 1 && kind != SPARSEMIXER) best_groups(key, choice, lane, experts, groups, top_groups);
        int mine = 0;
        float weight = MINUS_INF;
        for (int i = 0; i < k; i++) {
            const int e = argmax(key, lane, top);
            float chosen = 0.0f;
            if (kind == SPARSEMIXER) chosen = sparse_weight(score, key, value_of(top), distance);
#pragma unroll
            for (int j = 0; j < N; j++)
                if (e == lane + 32 * j) {
                    key[j] = KEY_MINUS_INF;
                    if (kind != SPARSEMIXER) chosen = score[j];
                }
            chosen = __shfl_sync(ALL, chosen, e & 31);
            if (lane == i) mine = e, weight = chosen;
        }
        if (kind == SOFTMAX_SELECTED) {
            weight = expf(weight - max_over_warp(weight));
            weight /= sum_over_warp(lane < k ? weight : 0.0f);
        } else if (renormalise && kind != SPARSEMIXER) {
            weight /= sum_over_warp(lane < k ? weight : 0.0f);
        }
        if (lane < k) {
            expert_tk[(size_t)t * k + lane] = mine;
            weight_tk[(size_t)t * k + lane] = kind == SPARSEMIXER ? weight : weight * scale;
            atomicAdd(&hist_e[mine], 1);
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += blockDim.x) hist_be[(size_t)blockIdx.x * experts + e] = hist_e[e];
}

// One for each number of experts that a lane holds at most.
extern "C" __global__ void __launch_bounds__(512) router_2(PARAMETERS) { route_rows<2>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(512) router_4(PARAMETERS) { route_rows<4>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(512) router_8(PARAMETERS) { route_rows<8>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(512, 1) router_16(PARAMETERS) { route_rows<16>(ARGUMENTS); }
