// nvcuda::wmma (16x16x16; fp16 or bf16 in, fp32 sums) and asynchronous copies for cudacpu.hpp, which includes this.
//
// A fragment's elements lie over the 32 lanes in an order of their own, not the hardware's: CUDA leaves it
// open, and a kernel that relies on one fails here.  Loads and stores do not wait for other lanes, so a missing
// __syncwarp() shows up; mma_sync does.  An asynchronous copy is made at once or, where CUDACPU_SEED is odd,
// not before the wait that covers it: whichever of the two finds a missing wait or an early overwrite.
#pragma once

namespace cudacpu {

template <class T> inline float widen(T x) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(x);
    else return __half2float(x);
}

// Place of element i of a lane in the 16x16 matrix: a permutation, another one for each kind of matrix.
inline unsigned scattered(unsigned i, unsigned kind) { return ((cur->lane * 8 + i) * (37 + 64 * kind) + 11) & 255; }

inline void check_matrix(const void *p, unsigned ld, unsigned bytes) {
    if (reinterpret_cast<uintptr_t>(p) & 31) fail("wmma: a matrix that is not at a multiple of 32 bytes");
    if (ld < 16 || ld * bytes % 16) fail("wmma: a leading dimension that is no multiple of 16 bytes, or less than 16");
}

struct Operands { float a[256], b[256]; };
inline thread_local Operands operands[32];  // one for each warp of a block

struct Copy { void *to; const void *from; bool there; };
struct Copies {
    unsigned long run = 0;  // of a block: copies that an earlier one did not wait for are lost with its shared memory
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};
inline thread_local std::map<unsigned, Copies> copies;  // of each thread of the block that runs

inline Copies &my_copies() {
    Copies &mine = copies[cur->linear];
    if (mine.run != block_run) mine = Copies{block_run, {}, {}};
    return mine;
}
inline void perform(const Copy &c) {
    if (c.there) std::memcpy(c.to, c.from, 16);
    else std::memset(c.to, 0, 16);
}
inline void copy16(void *to, const void *from, bool there) {
    if ((reinterpret_cast<uintptr_t>(to) | (there ? reinterpret_cast<uintptr_t>(from) : 0)) & 15)
        fail("an asynchronous copy of 16 bytes that are not at a multiple of 16");
    const char *seed = std::getenv("CUDACPU_SEED");
    if (seed && std::atoi(seed) % 2) my_copies().open.push_back({to, from, there});
    else perform({to, from, there});
}
inline void copies_end_group() {
    Copies &mine = my_copies();
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}
// Waits until no more than the `latest` groups are under way.
inline void copies_wait(unsigned latest) {
    Copies &mine = my_copies();
    while (mine.groups.size() > latest) {
        for (const Copy &c : mine.groups.front()) perform(c);
        mine.groups.erase(mine.groups.begin());
    }
}
}  // namespace cudacpu

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
    static_assert(M == 16 && N == 16 && K == 16);
    static constexpr unsigned kind = std::is_same_v<Use, matrix_a> ? 0 : std::is_same_v<Use, matrix_b> ? 1 : 2;
    static constexpr int num_elements = 8;
    using element_type = T;
    T x[num_elements];
};

template <class F> inline size_t element_at(unsigned i, unsigned ld, bool rows) {
    const unsigned place = cudacpu::scattered(i, F::kind), row = place / 16, column = place % 16;
    return rows ? size_t(row) * ld + column : size_t(column) * ld + row;
}

template <class Use, class T, class Layout>
inline void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout> &f, const T *p, unsigned ld) {
    cudacpu::check_matrix(p, ld, sizeof(T));
    for (unsigned i = 0; i < 8; i++)
        f.x[i] = p[element_at<fragment<Use, 16, 16, 16, T, Layout>>(i, ld, std::is_same_v<Layout, row_major>)];
}
using Accumulator = fragment<accumulator, 16, 16, 16, float>;
inline void load_matrix_sync(Accumulator &f, const float *p, unsigned ld, layout_t layout) {
    cudacpu::check_matrix(p, ld, sizeof(float));
    for (unsigned i = 0; i < 8; i++) f.x[i] = p[element_at<Accumulator>(i, ld, layout == mem_row_major)];
}
inline void store_matrix_sync(float *p, const Accumulator &f, unsigned ld, layout_t layout) {
    cudacpu::check_matrix(p, ld, sizeof(float));
    for (unsigned i = 0; i < 8; i++) p[element_at<Accumulator>(i, ld, layout == mem_row_major)] = f.x[i];
}
template <class F, class V> inline void fill_fragment(F &f, V value) {
    for (auto &x : f.x) x = value;
}

template <class T, class LayoutA, class LayoutB>
inline void mma_sync(Accumulator &d, const fragment<matrix_a, 16, 16, 16, T, LayoutA> &a,
                     const fragment<matrix_b, 16, 16, 16, T, LayoutB> &b, const Accumulator &c) {
    cudacpu::Operands &all = cudacpu::operands[cudacpu::cur->linear / 32];
    for (unsigned i = 0; i < 8; i++) {
        all.a[cudacpu::scattered(i, 0)] = cudacpu::widen(a.x[i]);
        all.b[cudacpu::scattered(i, 1)] = cudacpu::widen(b.x[i]);
    }
    cudacpu::wait_warp(0xffffffffu);
    for (unsigned i = 0; i < 8; i++) {
        const unsigned place = cudacpu::scattered(i, 2), row = place / 16, column = place % 16;
        float sum = c.x[i];
        for (unsigned k = 0; k < 16; k++) sum += all.a[row * 16 + k] * all.b[k * 16 + column];
        d.x[i] = sum;
    }
    cudacpu::wait_warp(0xffffffffu);
}
}  // namespace nvcuda::wmma
