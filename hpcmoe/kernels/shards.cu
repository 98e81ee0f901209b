// Sums over tensor shards, and what stands around them: rows to 16 bits for the way, and into the residual stream.
#include "common.cuh"

__device__ __forceinline__ float load(const T *x, size_t i) { return to_float(x[i]); }
__device__ __forceinline__ float load(const float *x, size_t i) { return x[i]; }
__device__ __forceinline__ void store(T *x, size_t i, float v) { x[i] = to_t(v); }
__device__ __forceinline__ void store(float *x, size_t i, float v) { x[i] = v; }

__device__ __forceinline__ void load_4(const T *x, size_t i, float v[4]) {
    Four f;
    f.bits = *reinterpret_cast<const uint2 *>(x + i);
#pragma unroll
    for (int c = 0; c < 4; c++) v[c] = to_float(f.t[c]);
}
__device__ __forceinline__ void load_4(const float *x, size_t i, float v[4]) {
    const float4 f = *reinterpret_cast<const float4 *>(x + i);
    v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
}
__device__ __forceinline__ void store_4(T *x, size_t i, const float v[4]) {
    Four f;
#pragma unroll
    for (int c = 0; c < 4; c++) f.t[c] = to_t(v[c]);
    *reinterpret_cast<uint2 *>(x + i) = f.bits;
}
__device__ __forceinline__ void store_4(float *x, size_t i, const float v[4]) {
    *reinterpret_cast<float4 *>(x + i) = make_float4(v[0], v[1], v[2], v[3]);
}

// out = (ADD ? out : 0) + the sum of `parts` arrays of `count` numbers, one after the other, in their order.
template <typename In, typename Out, bool ADD>
__device__ __forceinline__ void four(const In *in, Out *out, int parts, int count) {
    const size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;  // count is a multiple of 4
    if (i >= count) return;
    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f}, v[4];
    if (ADD) load_4(out, i, total);
    for (int j = 0; j < parts; j++) {
        load_4(in, size_t(j) * count + i, v);
#pragma unroll
        for (int c = 0; c < 4; c++) total[c] += v[c];
    }
    store_4(out, i, total);
}

template <typename In, typename Out, bool ADD>
__device__ __forceinline__ void one(const In *in, Out *out, int parts, int count) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float total = ADD ? load(out, i) : 0.0f;
    for (int j = 0; j < parts; j++) total += load(in, size_t(j) * count + i);
    store(out, i, total);
}

extern "C" __global__ void __launch_bounds__(128) sum_4(const T *in, T *out, int parts, int count) {
    four<T, T, false>(in, out, parts, count);
}
extern "C" __global__ void __launch_bounds__(128) sum_1(const T *in, T *out, int parts, int count) {
    one<T, T, false>(in, out, parts, count);
}
extern "C" __global__ void __launch_bounds__(128) narrow_4(const float *in, T *out, int parts, int count) {
    four<float, T, false>(in, out, parts, count);
}
extern "C" __global__ void __launch_bounds__(128) narrow_1(const float *in, T *out, int parts, int count) {
    one<float, T, false>(in, out, parts, count);
}
extern "C" __global__ void __launch_bounds__(128) add_4(const T *in, float *out, int parts, int count) {
    four<T, float, true>(in, out, parts, count);
}
extern "C" __global__ void __launch_bounds__(128) add_1(const T *in, float *out, int parts, int count) {
    one<T, float, true>(in, out, parts, count);
}

// Columns first to first + width of an array whose rows have `stride` numbers: in [rows, width], 32 bits each.
extern "C" __global__ void __launch_bounds__(128) columns(const float *in, float *out, int rows, int width, int stride, int first) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < size_t(rows) * width) out[i / width * stride + first + i % width] = in[i];
}
