// Rows of bytes, copied to or from the places that an index names.
#include "common.cuh"

constexpr int GROUPS = 4;  // units per thread

// threads.y rows per block, threads.x x GROUPS units of each, `chunks` blocks along a row.
template <typename Unit>
__device__ __forceinline__ void copy_rows(const Unit *source_id, const int *index_i, Unit *out_id, const int *rows,
                                          int most, int width, int chunks, int scatter) {
    const int row = (blockIdx.x / chunks) * blockDim.y + threadIdx.y;
    if (row >= row_count(rows, most)) return;
    const int first = (blockIdx.x % chunks) * GROUPS * blockDim.x + threadIdx.x;
    const size_t there = index_i[row];
    const Unit *from = source_id + (scatter ? size_t(row) : there) * width;
    Unit *to = out_id + (scatter ? there : size_t(row)) * width, unit[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
        if (first + g * int(blockDim.x) < width) unit[g] = from[first + g * blockDim.x];
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
        if (first + g * int(blockDim.x) < width) to[first + g * blockDim.x] = unit[g];
}

extern "C" __global__ void __launch_bounds__(128) rows_16(
    const uint4 *__restrict__ source_id, const int *__restrict__ index_i, uint4 *__restrict__ out_id, const int *rows,
    int most, int width, int chunks, int scatter) {
    copy_rows(source_id, index_i, out_id, rows, most, width, chunks, scatter);
}

extern "C" __global__ void __launch_bounds__(128) rows_4(
    const unsigned *__restrict__ source_id, const int *__restrict__ index_i, unsigned *__restrict__ out_id,
    const int *rows, int most, int width, int chunks, int scatter) {
    copy_rows(source_id, index_i, out_id, rows, most, width, chunks, scatter);
}

extern "C" __global__ void __launch_bounds__(128) rows_1(
    const unsigned char *__restrict__ source_id, const int *__restrict__ index_i, unsigned char *__restrict__ out_id,
    const int *rows, int most, int width, int chunks, int scatter) {
    copy_rows(source_id, index_i, out_id, rows, most, width, chunks, scatter);
}
