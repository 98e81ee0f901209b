// The weighted sum of the experts' rows, the choices in order: added to the residual stream, or rounded to T by itself.
#include "common.cuh"

constexpr int GROUPS = 2;  // times four columns per thread
constexpr int AHEAD = 4;   // choices whose rows are loaded at once

#define PARAMETERS(Out)                                                                                        \
    Out *__restrict__ x_td, const T *__restrict__ y_sd, const float *__restrict__ weight_tk,                   \
        const int *__restrict__ slot_tk, const int *rows, int most, int width, int chunks, int choices
#define ARGUMENTS x_td, y_sd, weight_tk, slot_tk, rows, most, width, chunks, choices

// What is there before: in the residual stream its row, else nothing.
__device__ __forceinline__ float4 before_4(const float *x) { return *reinterpret_cast<const float4 *>(x); }
__device__ __forceinline__ float4 before_4(const T *) { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }
__device__ __forceinline__ float before_1(const float *x) { return *x; }
__device__ __forceinline__ float before_1(const T *) { return 0.0f; }
__device__ __forceinline__ void store_4(float *x, float4 v) { *reinterpret_cast<float4 *>(x) = v; }
__device__ __forceinline__ void store_4(T *x, float4 v) {
    Four f;
    f.t[0] = to_t(v.x), f.t[1] = to_t(v.y), f.t[2] = to_t(v.z), f.t[3] = to_t(v.w);
    *reinterpret_cast<uint2 *>(x) = f.bits;
}
__device__ __forceinline__ void store_1(float *x, float v) { *x = v; }
__device__ __forceinline__ void store_1(T *x, float v) { *x = to_t(v); }

// blockDim.x x 4 x GROUPS columns of a row per block, `chunks` blocks per row; the width is a multiple of 4.
// SOME: a slot below 0 adds nothing.
template <bool SOME, typename Out>
__device__ __forceinline__ void add_4(PARAMETERS(Out)) {
    const int row = blockIdx.x / chunks;
    if (row >= row_count(rows, most)) return;
    const int first = ((blockIdx.x % chunks) * GROUPS * blockDim.x + threadIdx.x) * 4, step = blockDim.x * 4;
    Out *x_d = x_td + size_t(row) * width;
    const float *weight_k = weight_tk + size_t(row) * choices;
    const int *slot_k = slot_tk + size_t(row) * choices;
    float4 x[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
        if (first + g * step < width) x[g] = before_4(x_d + first + g * step);
    for (int k = 0; k < choices; k += AHEAD) {
        Four y[AHEAD][GROUPS];
        float weight[AHEAD];
        bool here[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            here[j] = k + j < choices && (!SOME || slot_k[k + j] >= 0);
            if (!here[j]) continue;
            const T *y_d = y_sd + size_t(slot_k[k + j]) * width;
            weight[j] = weight_k[k + j];
#pragma unroll
            for (int g = 0; g < GROUPS; g++)
                if (first + g * step < width)
                    y[j][g].bits = __ldg(reinterpret_cast<const uint2 *>(y_d + first + g * step));
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            if (!here[j]) continue;
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                x[g].x += weight[j] * to_float(y[j][g].t[0]);
                x[g].y += weight[j] * to_float(y[j][g].t[1]);
                x[g].z += weight[j] * to_float(y[j][g].t[2]);
                x[g].w += weight[j] * to_float(y[j][g].t[3]);
            }
        }
    }
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
        if (first + g * step < width) store_4(x_d + first + g * step, x[g]);
}

// Any width: one column per thread.
template <bool SOME, typename Out>
__device__ __forceinline__ void add_1(PARAMETERS(Out)) {
    const int row = blockIdx.x / chunks, c = (blockIdx.x % chunks) * blockDim.x + threadIdx.x;
    if (row >= row_count(rows, most) || c >= width) return;
    float x = before_1(x_td + size_t(row) * width + c);
    for (int k = 0; k < choices; k++) {
        const size_t pair = size_t(row) * choices + k;
        if (SOME && slot_tk[pair] < 0) continue;
        x += weight_tk[pair] * to_float(y_sd[size_t(slot_tk[pair]) * width + c]);
    }
    store_1(x_td + size_t(row) * width + c, x);
}

extern "C" __global__ void __launch_bounds__(128) merge_4(PARAMETERS(float)) { add_4<false>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(128) merge_1(PARAMETERS(float)) { add_1<false>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(128) merge_some_4(PARAMETERS(float)) { add_4<true>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(128) merge_some_1(PARAMETERS(float)) { add_1<true>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(128) sum_some_4(PARAMETERS(T)) { add_4<true>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(128) sum_some_1(PARAMETERS(T)) { add_1<true>(ARGUMENTS); }
