// Runs CUDA kernels on the CPU, one fiber per CUDA thread, so that a kernel's
// results can be tested on a machine without a GPU.
//
//   g++ -std=c++20 -O1 -g -x c++ -include cudacpu.hpp -I<cuda>/include ...
//
// The CUDA headers (for float4, __nv_bfloat16, __half, fp8) are the toolkit's
// own; the nvidia-cuda-runtime wheel is enough.  Blocks run one after another;
// inside a block a fiber runs until it reaches a barrier or a warp primitive.
// CUDACPU_SEED=<n> shuffles the order in which fibers (and blocks) are run, so
// a missing __syncthreads() shows up as a result that changes with the seed.
// A barrier that not every live thread reaches is reported and aborts.
//
// Known differences: dynamic shared memory must be declared with
// CUDACPU_DYNAMIC_SHARED(type, name); inline PTX, textures, cooperative groups,
// tensor-core instructions and cp.async are not covered; fast-math intrinsics
// are computed exactly.
#pragma once
#define CUDACPU 1
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#include <sys/mman.h>

#include <vector_types.h>
#include <vector_functions.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

namespace cudacpu {

inline constexpr unsigned warp_size = 32;
inline constexpr size_t stack_bytes = 64 * 1024;

struct Barrier { unsigned arrived = 0; unsigned long generation = 0; };

struct Warp {
    unsigned live = 0;                     // lanes that have not returned yet
    Barrier full;                          // of all 32 lanes
    std::map<unsigned, Barrier> partial;   // one for each other mask in use
    alignas(16) unsigned char slot[32][16];
    unsigned pred = 0;
};

struct Fiber {
    void *sp = nullptr;
    unsigned char *stack = nullptr;
    uint3 tid{};
    unsigned linear = 0, lane = 0;
    Warp *warp = nullptr;
    bool done = false, blocked = false;
};

struct Block {
    dim3 grid, block;
    uint3 bid{};
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Barrier barrier;
    unsigned live = 0;
    unsigned syncthreads_pred = 0;
    unsigned char *dynamic = nullptr;
    void (*body)(void *) = nullptr;
    void *body_arg = nullptr;
    void *scheduler_sp = nullptr;
    bool progress = false;
};

inline thread_local Block *blk = nullptr;
inline thread_local Fiber *cur = nullptr;
inline thread_local unsigned long block_run = 0;  // counts the blocks of all launches

[[noreturn]] inline void fail(const char *what) {
    if (cur)
        std::fprintf(stderr, "cudacpu: %s (block %u,%u,%u thread %u,%u,%u)\n", what, blk->bid.x, blk->bid.y,
                     blk->bid.z, cur->tid.x, cur->tid.y, cur->tid.z);
    else
        std::fprintf(stderr, "cudacpu: %s\n", what);
    std::abort();
}

// --- context switch (x86-64 and aarch64 System V) --------------------------------
extern "C" void cudacpu_switch(void **save_sp, void *load_sp);
#if defined(__x86_64__)
asm(R"(
.text
.weak cudacpu_switch
.type cudacpu_switch,@function
cudacpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cudacpu_switch,.-cudacpu_switch
)");
inline void *first_sp(unsigned char *top, void (*entry)()) {
    auto p = reinterpret_cast<void **>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
    *--p = nullptr;                          // alignment: entry starts as if called
    *--p = reinterpret_cast<void *>(entry);  // return address
    for (int i = 0; i < 6; i++) *--p = nullptr;
    return p;
}
#elif defined(__aarch64__)
asm(R"(
.text
.weak cudacpu_switch
.type cudacpu_switch,%function
cudacpu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
inline void *first_sp(unsigned char *top, void (*entry)()) {
    auto p = reinterpret_cast<void **>((reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15)) - 160);
    std::memset(p, 0, 160);
    p[11] = reinterpret_cast<void *>(entry);
    return p;
}
#else
#error "cudacpu: no context switch for this processor"
#endif

inline void yield() { cudacpu_switch(&cur->sp, blk->scheduler_sp); }

inline void fiber_main() {
    blk->body(blk->body_arg);
    cur->done = true;
    blk->live--;
    cur->warp->live &= ~(1u << cur->lane);
    blk->progress = true;
    yield();
    fail("a finished thread was resumed");
}

// --- barriers --------------------------------------------------------------------
inline void wait_block() {
    Barrier &b = blk->barrier;
    unsigned long g = b.generation;
    b.arrived++;
    blk->progress = true;
    while (b.generation == g) {
        if (b.arrived == blk->live) { b.arrived = 0; b.generation++; break; }
        cur->blocked = true;
        yield();
    }
    cur->blocked = false;
    blk->progress = true;
}

inline void wait_warp(unsigned mask) {
    if (!(mask >> cur->lane & 1)) fail("warp primitive called by a lane outside its mask");
    Barrier &b = mask == 0xffffffffu ? cur->warp->full : cur->warp->partial[mask];
    unsigned long g = b.generation;
    b.arrived |= 1u << cur->lane;
    blk->progress = true;
    while (b.generation == g) {
        if (b.arrived == mask) { b.arrived = 0; b.generation++; break; }
        if (mask & ~cur->warp->live) fail("warp primitive names a lane that has returned or does not exist");
        cur->blocked = true;
        yield();
    }
    cur->blocked = false;
    blk->progress = true;
}

template <class T> inline T exchange(unsigned mask, T v, unsigned src) {
    static_assert(sizeof(T) <= 16);
    std::memcpy(cur->warp->slot[cur->lane], &v, sizeof v);
    wait_warp(mask);
    T r = v;
    if (mask >> src & 1) std::memcpy(&r, cur->warp->slot[src], sizeof r);
    wait_warp(mask);
    return r;
}
inline unsigned vote(unsigned mask, bool p) {
    unsigned bit = 1u << cur->lane;
    cur->warp->pred = p ? cur->warp->pred | bit : cur->warp->pred & ~bit;
    wait_warp(mask);
    unsigned r = cur->warp->pred & mask;
    wait_warp(mask);
    return r;
}
template <class T, class F> inline T reduce(unsigned mask, T v, F f) {
    std::memcpy(cur->warp->slot[cur->lane], &v, sizeof v);
    wait_warp(mask);
    bool first = true;
    T r{}, x;
    for (unsigned i = 0; i < warp_size; i++)
        if (mask >> i & 1) {
            std::memcpy(&x, cur->warp->slot[i], sizeof x);
            r = first ? x : f(r, x);
            first = false;
        }
    wait_warp(mask);
    return r;
}

// --- launch -------------------------------------------------------------------------
inline void run(dim3 grid, dim3 block, size_t shared, void (*body)(void *), void *arg) {
    unsigned n = block.x * block.y * block.z;
    if (n == 0 || n > 1024) fail("block size must be 1..1024 threads");
    if (shared > 227 * 1024) fail("more dynamic shared memory than a block can have");
    const char *s = std::getenv("CUDACPU_SEED");
    std::mt19937 rng(s ? std::atoi(s) : 0);
    Block B;
    B.grid = grid; B.block = block; B.body = body; B.body_arg = arg;
    B.fibers.resize(n);
    size_t pool = stack_bytes * n;
    auto stacks = static_cast<unsigned char *>(
        mmap(nullptr, pool, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED) fail("no memory for stacks");
    void *dynamic = nullptr;  // no byte more than was asked for: AddressSanitizer guards its end
    if (posix_memalign(&dynamic, 128, std::max<size_t>(shared, 1))) fail("no memory for dynamic shared memory");
    B.dynamic = static_cast<unsigned char *>(dynamic);
    std::vector<unsigned> order(n);
    std::vector<uint64_t> blocks(uint64_t(grid.x) * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), 0);
    if (s) std::shuffle(blocks.begin(), blocks.end(), rng);
    blk = &B;
    for (uint64_t bi : blocks) {
        B.bid = {unsigned(bi % grid.x), unsigned(bi / grid.x % grid.y), unsigned(bi / grid.x / grid.y)};
        B.warps.assign((n + warp_size - 1) / warp_size, Warp{});
        B.barrier = {};
        B.live = n;
        block_run++;
        std::memset(B.dynamic, 0xCD, shared);
        for (unsigned i = 0; i < n; i++) {
            Fiber &f = B.fibers[i];
            f = Fiber{};
            f.linear = i; f.lane = i % warp_size; f.warp = &B.warps[i / warp_size];
            f.warp->live |= 1u << f.lane;
            f.tid = {i % block.x, i / block.x % block.y, i / block.x / block.y};
            f.stack = stacks + stack_bytes * i;
            f.sp = first_sp(f.stack + stack_bytes, fiber_main);
        }
        std::iota(order.begin(), order.end(), 0);
        while (B.live) {
            if (s) std::shuffle(order.begin(), order.end(), rng);
            B.progress = false;
            for (unsigned i : order) {
                Fiber &f = B.fibers[i];
                if (f.done) continue;
                cur = &f;
                cudacpu_switch(&B.scheduler_sp, f.sp);
                cur = nullptr;
            }
            if (!B.progress && B.live) {
                for (auto &f : B.fibers)
                    if (!f.done) { cur = &f; break; }
                fail("deadlock: a barrier is waiting for threads that never reach it");
            }
        }
    }
    blk = nullptr;
    std::free(dynamic);
    munmap(stacks, pool);
}

template <class... A, size_t... I>
inline void launch_impl(void (*k)(A...), dim3 g, dim3 b, size_t shared, void **args, std::index_sequence<I...>) {
    auto pack = std::make_pair(k, std::tuple<std::remove_cv_t<A>...>(*static_cast<std::remove_cv_t<A> *>(args[I])...));
    run(g, b, shared, [](void *p) {
        auto &q = *static_cast<decltype(pack) *>(p);
        std::apply(q.first, q.second);
    }, &pack);
}
// Arguments as cuLaunchKernel takes them: an array of pointers to the values.
template <class... A> inline void launch(void (*k)(A...), dim3 g, dim3 b, size_t shared, void **args) {
    launch_impl(k, g, b, shared, args, std::index_sequence_for<A...>{});
}
template <class... A> inline std::vector<size_t> sizes(void (*)(A...)) { return {sizeof(A)...}; }

template <class T> inline T *dynamic_shared() {
    return reinterpret_cast<T *>(blk->dynamic);
}
}  // namespace cudacpu

// --- the CUDA C++ surface ------------------------------------------------------------
#undef __shared__
#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __shared__ static thread_local
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define CUDACPU_DYNAMIC_SHARED(T, name) T *name = cudacpu::dynamic_shared<T>()

#define threadIdx (cudacpu::cur->tid)
#define blockIdx (cudacpu::blk->bid)
#define blockDim (cudacpu::blk->block)
#define gridDim (cudacpu::blk->grid)
#define warpSize (cudacpu::warp_size)

inline void __syncthreads() { cudacpu::wait_block(); }
inline int __syncthreads_count(int p) {
    cudacpu::wait_block();
    if (p) cudacpu::blk->syncthreads_pred++;
    cudacpu::wait_block();
    int r = cudacpu::blk->syncthreads_pred;
    cudacpu::wait_block();
    cudacpu::blk->syncthreads_pred = 0;
    return r;
}
inline int __syncthreads_or(int p) { return __syncthreads_count(p) != 0; }
inline int __syncthreads_and(int p) { return __syncthreads_count(!p) == 0; }
inline void __syncwarp(unsigned m = 0xffffffffu) { cudacpu::wait_warp(m); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline unsigned __activemask() { return cudacpu::cur->warp->live; }

template <class T> inline T __shfl_sync(unsigned m, T v, int src, int w = 32) {
    unsigned l = cudacpu::cur->lane;
    return cudacpu::exchange(m, v, (l & ~(w - 1)) | (src & (w - 1)));
}
template <class T> inline T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32) {
    unsigned l = cudacpu::cur->lane, base = l & ~(w - 1);
    return cudacpu::exchange(m, v, l >= base + d ? l - d : l);
}
template <class T> inline T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32) {
    unsigned l = cudacpu::cur->lane, base = l & ~(w - 1);
    return cudacpu::exchange(m, v, l + d < base + w ? l + d : l);
}
template <class T> inline T __shfl_xor_sync(unsigned m, T v, int x, int w = 32) {
    unsigned l = cudacpu::cur->lane, base = l & ~(w - 1), s = l ^ x;
    return cudacpu::exchange(m, v, s < base + w ? s : l);
}
inline unsigned __ballot_sync(unsigned m, int p) { return cudacpu::vote(m, p); }
inline int __any_sync(unsigned m, int p) { return cudacpu::vote(m, p) != 0; }
inline int __all_sync(unsigned m, int p) { return cudacpu::vote(m, p) == m; }
template <class T> inline unsigned __match_any_sync(unsigned m, T v) {
    unsigned r = 0;
    std::memcpy(cudacpu::cur->warp->slot[cudacpu::cur->lane], &v, sizeof v);
    cudacpu::wait_warp(m);
    for (unsigned i = 0; i < 32; i++)
        if ((m >> i & 1) && !std::memcmp(cudacpu::cur->warp->slot[i], &v, sizeof v)) r |= 1u << i;
    cudacpu::wait_warp(m);
    return r;
}
template <class T> inline T __reduce_add_sync(unsigned m, T v) { return cudacpu::reduce(m, v, [](T a, T b) { return T(a + b); }); }
template <class T> inline T __reduce_max_sync(unsigned m, T v) { return cudacpu::reduce(m, v, [](T a, T b) { return std::max(a, b); }); }
template <class T> inline T __reduce_min_sync(unsigned m, T v) { return cudacpu::reduce(m, v, [](T a, T b) { return std::min(a, b); }); }

// One fiber runs at a time, so plain reads and writes are atomic here.
template <class T> inline T atomicAdd(T *p, std::type_identity_t<T> v) { T o = *p; *p = o + v; return o; }
template <class T> inline T atomicSub(T *p, std::type_identity_t<T> v) { T o = *p; *p = o - v; return o; }
template <class T> inline T atomicMax(T *p, std::type_identity_t<T> v) { T o = *p; *p = std::max(o, v); return o; }
template <class T> inline T atomicMin(T *p, std::type_identity_t<T> v) { T o = *p; *p = std::min(o, v); return o; }
template <class T> inline T atomicExch(T *p, std::type_identity_t<T> v) { T o = *p; *p = v; return o; }
template <class T> inline T atomicOr(T *p, std::type_identity_t<T> v) { T o = *p; *p = o | v; return o; }
template <class T> inline T atomicAnd(T *p, std::type_identity_t<T> v) { T o = *p; *p = o & v; return o; }
template <class T> inline T atomicCAS(T *p, std::type_identity_t<T> c, std::type_identity_t<T> v) { T o = *p; if (o == c) *p = v; return o; }

template <class T> inline T __ldg(const T *p) { return *p; }
template <class T> inline T __ldcs(const T *p) { return *p; }
template <class T> inline T __ldcg(const T *p) { return *p; }
template <class T> inline T __ldlu(const T *p) { return *p; }
template <class T> inline void __stcs(T *p, std::type_identity_t<T> v) { *p = v; }
template <class T> inline void __stcg(T *p, std::type_identity_t<T> v) { *p = v; }

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __brev(unsigned x) { unsigned r = 0; for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i); return r; }
inline int __float_as_int(float f) { int i; std::memcpy(&i, &f, 4); return i; }
inline float __int_as_float(int i) { float f; std::memcpy(&f, &i, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned i; std::memcpy(&i, &f, 4); return i; }
inline float __uint_as_float(unsigned i) { float f; std::memcpy(&f, &i, 4); return f; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __saturatef(float x) { return std::min(1.0f, std::max(0.0f, x)); }

// Intrinsics that the CUDA headers give to device code only; one rounding, as there.
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) { return __float2bfloat16(std::fma(__bfloat162float(a), __bfloat162float(b), __bfloat162float(c))); }
inline __half __hfma(__half a, __half b, __half c) { return __float2half(std::fma(__half2float(a), __half2float(b), __half2float(c))); }
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }

#include "wmma.hpp"
