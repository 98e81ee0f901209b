// What all kernels share. HM_BF16 chooses the 16-bit type T: bf16, else fp16. Sums are fp32.
#ifndef CUDACPU
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define CUDACPU_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

#ifdef HM_BF16
typedef __nv_bfloat16 T;
__device__ __forceinline__ float to_float(T x) { return __bfloat162float(x); }
__device__ __forceinline__ T to_t(float x) { return __float2bfloat16(x); }
#else
typedef __half T;
__device__ __forceinline__ float to_float(T x) { return __half2float(x); }
__device__ __forceinline__ T to_t(float x) { return __float2half(x); }
#endif

#define MINUS_INF (__int_as_float(0xff800000))

// Eight T in 16 bytes: what one thread loads or stores at once.
union Eight {
    uint4 bits;
    T t[8];
};

// Rows that there are: the number in device memory (so that a captured graph can be replayed), at most `most`.
__device__ __forceinline__ int row_count(const int *rows, int most) {
    if (!rows) return most;
    const int n = *rows;
    return n < most ? n : most;
}

// Four T in 8 bytes, next to four fp32 in 16: a warp then reads and writes whole sectors of both.
union Four {
    uint2 bits;
    T t[4];
};

// The sum over the warp, the same bits in every lane. All 32 lanes call it.
__device__ __forceinline__ float sum_over_warp(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// The sum over a block of whole warps, the same bits in every thread. All threads call it;
// part: 32 floats of shared memory that no other call uses.
__device__ __forceinline__ float sum_over_block(float x, float *part) {
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = sum_over_warp(x);
    if (lane == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    return sum_over_warp(lane < warps ? part[lane] : 0.0f);
}
