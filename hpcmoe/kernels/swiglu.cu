// act(gate) * up of an expert's first product. fp32 inside.
#include "common.cuh"

constexpr int GROUPS = 2;  // times eight columns per thread

enum Act { SILU, GELU, GELU_TANH, RELU };

template <Act ACT>
__device__ __forceinline__ float activate(float x) {
    if (ACT == RELU) return x < 0.0f ? 0.0f : x;  // a NaN stays one
    if (ACT == SILU) return x / (1.0f + __expf(-x));
    if (ACT == GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    return 0.5f * x * (1.0f + erff(x * 0.7071067812f));
}

struct Both {
    const T *both_if;  // gate, then up
    T *out_if;
    int width, first;  // f; this thread's first column
    int row;
};

template <Act ACT>
__device__ __forceinline__ void eights(const Both &p) {
    const T *gate_f = p.both_if + size_t(p.row) * 2 * p.width, *up_f = gate_f + p.width;
    const int step = blockDim.x * 8;
    Eight gate[GROUPS], up[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        const int c = p.first + g * step;
        if (c >= p.width) continue;
        gate[g].bits = *reinterpret_cast<const uint4 *>(gate_f + c);
        up[g].bits = *reinterpret_cast<const uint4 *>(up_f + c);
    }
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        const int c = p.first + g * step;
        if (c >= p.width) continue;
#pragma unroll
        for (int i = 0; i < 8; i++) gate[g].t[i] = to_t(activate<ACT>(to_float(gate[g].t[i])) * to_float(up[g].t[i]));
        *reinterpret_cast<uint4 *>(p.out_if + size_t(p.row) * p.width + c) = gate[g].bits;
    }
}

template <Act ACT>
__device__ __forceinline__ void one(const Both &p) {
    if (p.first >= p.width) return;
    const T *gate_f = p.both_if + size_t(p.row) * 2 * p.width + p.first;
    p.out_if[size_t(p.row) * p.width + p.first] = to_t(activate<ACT>(to_float(gate_f[0])) * to_float(gate_f[p.width]));
}

// blockDim.x x 8 x GROUPS columns of a row per block, `chunks` blocks per row; the width is a multiple of 8.
extern "C" __global__ void __launch_bounds__(128) swiglu_8(
    const T *__restrict__ both_if, T *__restrict__ out_if, const int *rows, int most, int width, int chunks, int act) {
    const int row = blockIdx.x / chunks;
    if (row >= row_count(rows, most)) return;
    const int first = ((blockIdx.x % chunks) * GROUPS * blockDim.x + threadIdx.x) * 8;
    const Both p{both_if, out_if, width, first, row};
    if (act == SILU) eights<SILU>(p);
    else if (act == GELU) eights<GELU>(p);
    else if (act == GELU_TANH) eights<GELU_TANH>(p);
    else eights<RELU>(p);
}

// Any width: one column per thread.
extern "C" __global__ void __launch_bounds__(128) swiglu_1(
    const T *__restrict__ both_if, T *__restrict__ out_if, const int *rows, int most, int width, int chunks, int act) {
    const int row = blockIdx.x / chunks;
    if (row >= row_count(rows, most)) return;
    const Both p{both_if, out_if, width, int((blockIdx.x % chunks) * blockDim.x + threadIdx.x), row};
    if (act == SILU) one<SILU>(p);
    else if (act == GELU) one<GELU>(p);
    else if (act == GELU_TANH) one<GELU_TANH>(p);
    else one<RELU>(p);
}
