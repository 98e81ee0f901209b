// RMS norm and layer norm of fp32 rows, with the residual add before it. One block per row.
#include "common.cuh"

struct Norm {
    float *x_td;          // the residual stream
    T *out_nd;
    const float *weight_d, *bias_d, *add_bias_d;
    const T *add_td;
    const int *row_n, *rows;
    int most, width;
    float eps;
    int layer;            // 1: layer norm, 0: RMS norm
};

__device__ __forceinline__ float4 plus(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ __forceinline__ float4 widen(Four v) {
    return make_float4(to_float(v.t[0]), to_float(v.t[1]), to_float(v.t[2]), to_float(v.t[3]));
}

__device__ __forceinline__ float total(float4 v) { return (v.x + v.y) + (v.z + v.w); }

__device__ __forceinline__ float squares(float4 v) { return (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w); }

// The row is kept in registers, V x 4 columns per thread; the width is a multiple of 4, at most V x 4 x threads.
template <int V>
__device__ __forceinline__ void norm_row(const Norm &p) {
    if (int(blockIdx.x) >= row_count(p.rows, p.most)) return;
    __shared__ float part[2][32];
    const int n = blockIdx.x;
    float *x_d = p.x_td + size_t(p.row_n ? p.row_n[n] : n) * p.width;
    float4 x[V];
    Four add[V];
#pragma unroll
    for (int v = 0; v < V; v++) {
        const int c = (v * blockDim.x + threadIdx.x) * 4;
        x[v] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (c >= p.width) continue;
        x[v] = *reinterpret_cast<const float4 *>(x_d + c);
        if (p.add_td) add[v].bits = *reinterpret_cast<const uint2 *>(p.add_td + size_t(n) * p.width + c);
    }
    if (p.add_td) {
#pragma unroll
        for (int v = 0; v < V; v++) {
            const int c = (v * blockDim.x + threadIdx.x) * 4;
            if (c >= p.width) continue;
            x[v] = plus(x[v], widen(add[v]));
            if (p.add_bias_d) x[v] = plus(x[v], *reinterpret_cast<const float4 *>(p.add_bias_d + c));
            *reinterpret_cast<float4 *>(x_d + c) = x[v];
        }
    }
    float sum = 0.0f;
    if (p.layer) {
#pragma unroll
        for (int v = 0; v < V; v++) sum += total(x[v]);
        const float mean = sum_over_block(sum, part[0]) / float(p.width);
#pragma unroll
        for (int v = 0; v < V; v++)  // columns beyond the width stay zero
            if ((v * blockDim.x + threadIdx.x) * 4 < p.width)
                x[v] = make_float4(x[v].x - mean, x[v].y - mean, x[v].z - mean, x[v].w - mean);
        sum = 0.0f;
    }
#pragma unroll
    for (int v = 0; v < V; v++) sum += squares(x[v]);
    const float factor = 1.0f / sqrtf(sum_over_block(sum, part[1]) / float(p.width) + p.eps);
#pragma unroll
    for (int v = 0; v < V; v++) {
        const int c = (v * blockDim.x + threadIdx.x) * 4;
        if (c >= p.width) continue;
        const float4 w = *reinterpret_cast<const float4 *>(p.weight_d + c);
        float4 y = make_float4(x[v].x * factor * w.x, x[v].y * factor * w.y, x[v].z * factor * w.z,
                               x[v].w * factor * w.w);
        if (p.bias_d) y = plus(y, *reinterpret_cast<const float4 *>(p.bias_d + c));
        Four out;
        out.t[0] = to_t(y.x), out.t[1] = to_t(y.y), out.t[2] = to_t(y.z), out.t[3] = to_t(y.w);
        *reinterpret_cast<uint2 *>(p.out_nd + size_t(n) * p.width + c) = out.bits;
    }
}

extern "C" __global__ void __launch_bounds__(512) norm_2(
    float *x_td, T *out_nd, const float *weight_d, const float *bias_d, const T *add_td, const float *add_bias_d,
    const int *row_n, const int *rows, int most, int width, float eps, int layer) {
    norm_row<2>(Norm{x_td, out_nd, weight_d, bias_d, add_bias_d, add_td, row_n, rows, most, width, eps, layer});
}

extern "C" __global__ void __launch_bounds__(1024) norm_4(
    float *x_td, T *out_nd, const float *weight_d, const float *bias_d, const T *add_td, const float *add_bias_d,
    const int *row_n, const int *rows, int most, int width, float eps, int layer) {
    norm_row<4>(Norm{x_td, out_nd, weight_d, bias_d, add_bias_d, add_td, row_n, rows, most, width, eps, layer});
}

// Any width, one column at a time. A thread meets the same columns in each turn, so x_td needs no barrier.
extern "C" __global__ void __launch_bounds__(1024) norm_any(
    float *x_td, T *out_nd, const float *weight_d, const float *bias_d, const T *add_td, const float *add_bias_d,
    const int *row_n, const int *rows, int most, int width, float eps, int layer) {
    if (int(blockIdx.x) >= row_count(rows, most)) return;
    __shared__ float part[2][32];
    const int n = blockIdx.x;
    float *x_d = x_td + size_t(row_n ? row_n[n] : n) * width;
    float sum = 0.0f, mean = 0.0f;
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
        float x = x_d[c];
        if (add_td) {
            x += to_float(add_td[size_t(n) * width + c]);
            if (add_bias_d) x += add_bias_d[c];
            x_d[c] = x;
        }
        sum += layer ? x : x * x;
    }
    sum = sum_over_block(sum, part[0]);
    if (layer) {
        mean = sum / float(width);
        sum = 0.0f;
        for (int c = threadIdx.x; c < width; c += blockDim.x) sum += (x_d[c] - mean) * (x_d[c] - mean);
        sum = sum_over_block(sum, part[1]);
    }
    const float factor = 1.0f / sqrtf(sum / float(width) + eps);
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
        const float y = (x_d[c] - mean) * factor * weight_d[c];
        out_nd[size_t(n) * width + c] = to_t(bias_d ? y + bias_d[c] : y);
    }
}
