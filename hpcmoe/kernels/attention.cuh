// What attention_decode.cu and attention_prefill.cu share: causal attention over a paged KV cache, with grouped KV
// heads and a sliding window.
//
// Online softmax in fp32 over tiles of keys (flash attention, arXiv 2205.14135); both products on tensor cores.
// A row of scores belongs to two neighbouring lanes. Weights of the softmax are taken relative to `base`, which lies
// LIFT below the largest score so far: fp16 weights of scores far below the largest then keep their digits.
#pragma once
#include "common.cuh"
#ifdef CUDACPU
using cudacpu::copy16;
__device__ __forceinline__ void end_copies() { cudacpu::copies_end_group(); }
template <int LATEST> __device__ __forceinline__ void wait_copies() { cudacpu::copies_wait(LATEST); }
#else
#include <mma.h>
// 16 bytes on their way into shared memory, zeros where `there` is false. Needs compute capability 8.0.
__device__ __forceinline__ void copy16(void *to, const void *from, bool there) {
    const unsigned shared = (unsigned)__cvta_generic_to_shared(to);
    const int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes));
}
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's groups of copies but the LATEST ones.
template <int LATEST> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LATEST) : "memory");
}
#endif

using namespace nvcuda;
typedef wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> Rows;
typedef wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> Keys;
typedef wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::row_major> Values;
typedef wmma::fragment<wmma::accumulator, 16, 16, 16, float> Sums;

#if defined(HM_BF16) && !defined(CUDACPU)
// load_matrix_sync from shared memory: mma.h's own does it with generic addresses for bf16, four loads instead of one.
#define LOAD_SHARED(Fragment, matrix)                                                                      \
    __device__ __forceinline__ void load(Fragment &f, const T *p, unsigned ld) {                           \
        static_assert(Fragment::num_elements == 8, "4 registers");                                         \
        unsigned *x = (unsigned *)f.x;                                                                     \
        asm volatile("wmma.load." matrix ".m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;"              \
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])                                      \
                     : "r"((unsigned)__cvta_generic_to_shared(p)), "r"(ld)                                 \
                     : "memory");                                                                          \
    }
LOAD_SHARED(Rows, "a.sync.aligned.row")
LOAD_SHARED(Keys, "b.sync.aligned.col")
LOAD_SHARED(Values, "b.sync.aligned.row")
#else
template <class Fragment> __device__ __forceinline__ void load(Fragment &f, const T *p, unsigned ld) {
    wmma::load_matrix_sync(f, p, ld);
}
#endif

#define LIFT 6.9314718f  // log 2^10
#define ALL 0xffffffffu

struct Cache {
    const T *k_phoc, *v_phoc;
    const int *page_p;  // of this sequence
    int kv_heads, kv, page_tokens, hd;
    // Elements before key (or value) `position` of this sequence and head.
    __device__ __forceinline__ size_t place(int position) const {
        const int page = position / page_tokens;
        return (((size_t)page_p[page] * kv_heads + kv) * page_tokens + (position - page * page_tokens)) * hd;
    }
};

// ROWS x HD elements on their way into shared memory, HD + 8 apart (no bank conflicts); zeros in rows outside
// [from, to) and in columns from hd on. The copies do not wait for each other: UNROLL is about registers.
template <int ROWS, int HD, int THREADS, int UNROLL, class Row>
__device__ __forceinline__ void fetch(T *shared, int thread, int hd, int from, int to, Row row_at) {
    constexpr int STEP = THREADS / (HD / 8);  // rows at a time
    static_assert(THREADS % (HD / 8) == 0 && ROWS % STEP == 0, "all threads have as many copies");
    const int row0 = thread / (HD / 8), column = thread % (HD / 8) * 8;
    shared += row0 * (HD + 8) + column;
#pragma unroll UNROLL
    for (int n = 0; n < ROWS; n += STEP)
        copy16(shared + n * (HD + 8), row_at(row0 + n) + column, row0 + n >= from && row0 + n < to && column < hd);
}

// The row (0..15) of each of this lane's elements of Sums, 4 bits each: CUDA leaves open which these are.
__device__ __forceinline__ unsigned rows_of_sums(float *shared) {
    static_assert(Sums::num_elements == 8, "8 elements of 4 bits");
    const int lane = threadIdx.x % 32;
    for (int i = lane; i < 256; i += 32) shared[i] = (float)(i / 16);
    __syncwarp();
    Sums row;
    wmma::load_matrix_sync(row, shared, 16, wmma::mem_row_major);
    __syncwarp();
    unsigned rows = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) rows |= (unsigned)row.x[i] << 4 * i;
    return rows;
}

// 16 x N scores, N + 8 apart, become weights T, N + 8 apart in the same memory; columns outside [from, to) weigh
// nothing. Returns whether earlier sums must be multiplied by scale_r, which is each row's.
template <int N>
__device__ __forceinline__ bool softmax(float *score, float *scale_r, float &base, float &sum, int from, int to) {
    const int lane = threadIdx.x % 32, row = lane / 2, side = lane % 2 * 4;
    float x[N / 2], most = MINUS_INF;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        const float4 s = *(const float4 *)(score + row * (N + 8) + 8 * j + side);
        const float four[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
        for (int i = 0; i < 4; i++) x[4 * j + i] = four[i];
    }
    if (from > 0 || to < N) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const int column = i / 4 * 8 + side + i % 4;
            if (column < from || column >= to) x[i] = MINUS_INF;
        }
    }
#pragma unroll
    for (int i = 0; i < N / 2; i++) most = fmaxf(most, x[i]);
    most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
    const float now = fmaxf(base, most - LIFT), zero = now == MINUS_INF ? 0.0f : now;
    const float scale = __expf(base - zero);
    float part = 0.0f;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        Four weight;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            weight.t[i] = to_t(__expf(x[4 * j + i] - zero));
            part += to_float(weight.t[i]);  // what is summed is what the values are multiplied by
        }
        *(uint2 *)((T *)score + row * (N + 8) + 8 * j + side) = weight.bits;
    }
    sum = sum * scale + part + __shfl_xor_sync(ALL, part, 1);
    base = now;
    scale_r[row] = scale;
    __syncwarp();
    return __any_sync(ALL, scale != 1.0f);
}

// out = out * scale_r + weights (16 x N) times values (N rows of HD).
template <int N, int HD>
__device__ __forceinline__ void add_values(Sums *out, const T *weight, const T *value, const float *scale_r,
                                           unsigned rows, bool rescale) {
    if (rescale) {
        float scale[8];
#pragma unroll
        for (int i = 0; i < 8; i++) scale[i] = scale_r[rows >> 4 * i & 15];
#pragma unroll
        for (int c = 0; c < HD / 16; c++)
#pragma unroll
            for (int i = 0; i < 8; i++) out[c].x[i] *= scale[i];
    }
#pragma unroll
    for (int n = 0; n < N / 16; n++) {
        Rows w;
        load(w, weight + n * 16, N + 8);
#pragma unroll
        for (int c = 0; c < HD / 16; c++) {
            Values v;
            load(v, value + n * 16 * (HD + 8) + c * 16, HD + 8);
            wmma::mma_sync(out[c], w, v, out[c]);
        }
    }
}

// Shared memory from the next multiple of 32 bytes on, as fragments want it.
__device__ __forceinline__ unsigned char *aligned(unsigned char *shared) { return shared + (-(size_t)shared & 31); }
