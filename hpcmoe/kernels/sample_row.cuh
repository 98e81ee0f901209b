// For sample.cu: a row of logits, the order of its tokens, its random number, and totals over bins.
#pragma once
#include "common.cuh"

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int BINS = 2048;       // of equal width in the logit; the last one also takes all that is farther away
constexpr float SPAN = 32.f;     // in temperatures: tokens farther below the largest share the last bin
constexpr int DIGITS = 1024;     // bins of equal width in the key, where one of the above is too full for the list
constexpr int LIST = 2048;       // tokens that are put in order at once
constexpr float LOWEST = -3.402823466e38f;  // of all finite ones
constexpr double NOTHING = -44;  // below exp(-44) of the largest, a probability is less than half a unit

struct Row {  // one row of logits and what its first pass found
    const float *logit, *bias;
    int vocab;
    float largest, bin_scale;
    double inverse_t, unit;  // 1 / temperature; how many units the largest logit's probability is
};

struct Shared {
    u64 mass[BINS];
    u32 count[BINS];
    u64 list[LIST];  // or, while a bin is narrowed down, the masses and counts of its digits
    u64 through;     // what find() found: the mass up to a token, and the token
    u32 token, filled;
    int chosen;
};

__device__ __forceinline__ float value(const Row &r, int i) {
    return r.bias ? __ldg(r.logit + i) + __ldg(r.bias + i) : __ldg(r.logit + i);
}

// f(index, logit) for this thread's part of the row, indices rising; 16 bytes at a time but for the ends.
template <class F> __device__ __forceinline__ void each(const Row &r, F f) {
    const int ahead = int((16 - (reinterpret_cast<size_t>(r.logit) & 15)) & 15) / 4;
    const int head = ahead < r.vocab ? ahead : r.vocab, vectors = (r.vocab - head) / 4;
    if (int(threadIdx.x) < head) f(int(threadIdx.x), value(r, threadIdx.x));
    const float4 *wide = reinterpret_cast<const float4 *>(r.logit + head);
    for (int j = threadIdx.x; j < vectors; j += blockDim.x) {
        const float4 four = __ldg(wide + j);
        float x[4] = {four.x, four.y, four.z, four.w};
        const int i = head + 4 * j;
#pragma unroll
        for (int c = 0; c < 4; c++) f(i + c, r.bias ? x[c] + __ldg(r.bias + i + c) : x[c]);
    }
    const int tail = head + 4 * vectors + threadIdx.x;
    if (tail < r.vocab) f(tail, value(r, tail));
}

template <class V, class F> __device__ __forceinline__ V reduce(V v, F combine) {
    __shared__ V part[32];
    for (int d = 16; d; d >>= 1) v = combine(v, __shfl_xor_sync(0xffffffffu, v, d));
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    v = part[0];
    for (int i = 1; i < int(blockDim.x / 32); i++) v = combine(v, part[i]);
    __syncthreads();
    return v;
}

// ---- the order of the tokens as integers: falling logit (both zeros alike), then rising index
__device__ __forceinline__ u32 key_of(float x) {  // unsigned integers in the order of the logits
    const u32 bits = __float_as_uint(x + 0.f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ u64 order_of(float x, int i) { return u64(~key_of(x)) << 32 | u32(i); }
__device__ __forceinline__ float logit_of(u64 order) {
    const u32 key = ~u32(order >> 32);
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ int bin_of(const Row &r, float x) {
    return int(fminf((r.largest - x) * r.bin_scale, BINS - 1.f));
}
__device__ __forceinline__ u64 mass_of(const Row &r, float x) {
    const double below = (double(x) - double(r.largest)) * r.inverse_t;
    return below > NOTHING ? u64(exp(below) * r.unit + 0.5) : 0;
}

// ---- the random number
__device__ double uniform(u64 seed, u64 request, u64 position) {  // Philox 4x32-10 (Salmon et al., SC11), 53 bits
    u32 c0 = u32(position), c1 = u32(position >> 32), c2 = u32(request), c3 = u32(request >> 32);
    u32 k0 = u32(seed), k1 = u32(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const u64 p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
        c0 = u32(p1 >> 32) ^ c1 ^ k0;
        c1 = u32(p1);
        c2 = u32(p0 >> 32) ^ c3 ^ k1;
        c3 = u32(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return ((c0 >> 5) * 67108864.0 + (c1 >> 6)) / 9007199254740992.0;
}

// ---- sums per bin
__device__ __forceinline__ void add(u64 *total, u64 mass) {  // 32-bit atomics are the fast ones: carry by hand
    if (!mass) return;
    u32 *word = reinterpret_cast<u32 *>(total);
    const u32 low = u32(mass), before = atomicAdd(word, low);
    const u32 high = u32(mass >> 32) + (before + low < before);
    if (high) atomicAdd(word + 1, high);
}

__device__ void clear(u32 *count, u64 *mass, int length) {
    for (int i = threadIdx.x; i < length; i += blockDim.x) count[i] = 0, mass[i] = 0;
    __syncthreads();
}

// Running totals in place: count[i] and mass[i] become the sums over 0..i.
__device__ void accumulate(u32 *count, u64 *mass, int length) {
    __shared__ u32 warp_count[32];
    __shared__ u64 warp_mass[32];
    const int each = (length + blockDim.x - 1) / blockDim.x, first = min(length, int(threadIdx.x) * each);
    const int end = min(length, first + each), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();
    u32 n = 0, n_own;
    u64 m = 0, m_own;
    for (int i = first; i < end; i++) n += count[i], m += mass[i];
    n_own = n, m_own = m;
    for (int d = 1; d < 32; d <<= 1) {
        const u32 n_left = __shfl_up_sync(0xffffffffu, n, d);
        const u64 m_left = __shfl_up_sync(0xffffffffu, m, d);
        if (lane >= d) n += n_left, m += m_left;
    }
    if (lane == 31) warp_count[warp] = n, warp_mass[warp] = m;
    __syncthreads();
    n -= n_own, m -= m_own;
    for (int w = 0; w < warp; w++) n += warp_count[w], m += warp_mass[w];
    for (int i = first; i < end; i++) {
        n += count[i], m += mass[i];
        count[i] = n, mass[i] = m;
    }
    __syncthreads();
}

// The first of the running totals that exceeds the goal.
__device__ int exceeds(Shared &s, const u32 *count, const u64 *mass, int length, bool by_count, u64 goal) {
    for (int i = threadIdx.x; i < length; i += blockDim.x) {
        const u64 here = by_count ? count[i] : mass[i];
        const u64 before = i == 0 ? 0 : by_count ? count[i - 1] : mass[i - 1];
        if (here > goal && (i == 0 || before <= goal)) s.chosen = i;
    }
    __syncthreads();
    const int chosen = s.chosen;
    __syncthreads();
    return chosen;
}
