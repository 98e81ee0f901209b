// Rows of the embedding table, widened to the residual stream's fp32. The table holds `ids` token ids from `first_id`
// on (a tensor shard's part of the vocabulary): rows of other ids are zero.
#include "common.cuh"

constexpr int GROUPS = 4;  // times four columns per thread

// blockDim.x x 4 x GROUPS columns of a row per block, `chunks` blocks per row; the width is a multiple of 4.
extern "C" __global__ void __launch_bounds__(128) embed_4(
    const T *__restrict__ table_vd, const int *__restrict__ token_t, float *__restrict__ x_td, const int *rows,
    int most, int width, int chunks, int first_id, int ids) {
    const int row = blockIdx.x / chunks;
    if (row >= row_count(rows, most)) return;
    const int id = token_t[row] - first_id;
    const bool here = id >= 0 && id < ids;
    const int first = ((blockIdx.x % chunks) * GROUPS * blockDim.x + threadIdx.x) * 4, step = blockDim.x * 4;
    const T *table_d = table_vd + size_t(here ? id : 0) * width;
    float *x_d = x_td + size_t(row) * width;
    Four v[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
        if (first + g * step < width)
            v[g].bits = here ? *reinterpret_cast<const uint2 *>(table_d + first + g * step) : make_uint2(0u, 0u);
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
        if (first + g * step < width)
            *reinterpret_cast<float4 *>(x_d + first + g * step) =
                make_float4(to_float(v[g].t[0]), to_float(v[g].t[1]), to_float(v[g].t[2]), to_float(v[g].t[3]));
}

// Any width: one column per thread.
extern "C" __global__ void __launch_bounds__(128) embed_1(
    const T *__restrict__ table_vd, const int *__restrict__ token_t, float *__restrict__ x_td, const int *rows,
    int most, int width, int chunks, int first_id, int ids) {
    const int row = blockIdx.x / chunks, c = (blockIdx.x % chunks) * blockDim.x + threadIdx.x;
    if (row >= row_count(rows, most) || c >= width) return;
    const int id = token_t[row] - first_id;
    x_td[size_t(row) * width + c] = id >= 0 && id < ids ? to_float(table_vd[size_t(id) * width + c]) : 0.0f;
}
