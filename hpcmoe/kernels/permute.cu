// Permute: rows to their send slots, sorted stably by expert, or by the slots of experts' copies. The blocks share out all (row, chunk of
// columns) items evenly and in order, whatever the router's blocks of rows were: each block finds the
// slots of its own rows from the router's histograms and the choices since the last histogram boundary.
#include "common.cuh"
#include <cuda_fp8.h>

#define ALL 0xffffffffu
#define RANKERS 8    // warps that rank pairs, as in permute.py
#define CHUNK 1024   // elements of a row that a warp copies at once, as in permute.py
#define LOADS (CHUNK / 8 / 32)
#define E4M3_MOST 448.0f

#define PARAMETERS                                                                                             \
    const T *x_td, const int *expert_tk, const int *hist_be, int *slot_tk, void *x_sd, int *n_send_e,          \
        const int *rows, int most, int d, int k, int experts, int hist_blocks, int rows_per_hist,              \
        const int *copies, int copy_slots
#define SLOT_ARGUMENTS expert_tk, hist_be, slot_tk, n_send_e, k, experts, hist_blocks, rows_per_hist, copies, copy_slots

// What a block has to copy: items [first, end) of rows [row, row_end).
struct Share {
    int chunks, first, end, row, row_end;
};

__device__ __forceinline__ Share share_of(int n, int chunks) {
    const int items = n * chunks, each = (items + gridDim.x - 1) / gridDim.x;
    Share s;
    s.chunks = chunks;
    s.first = min((int)blockIdx.x * each, items);
    s.end = min(s.first + each, items);
    s.row = s.first / chunks;
    s.row_end = s.end > s.first ? (s.end - 1) / chunks + 1 : s.row;
    return s;
}

// Which copies of an expert get which of its rows (model/copies.py, Copies.turns); no table: every expert has the slot of its number.
struct Turns {
    const int *first_e, *slot_x, *expert_s, *turn_s;
    int slots;

    __device__ Turns(const int *table, int experts, int slots)
        : first_e(table), slot_x(table + experts + 1), expert_s(slot_x + slots), turn_s(expert_s + slots), slots(slots) {}

    __device__ int count(int e) const { return first_e[e + 1] - first_e[e]; }
    // Of the rows of each expert, those of a slot.
    __device__ int rows(int s, const int *total_e) const {
        const int e = expert_s[s], c = count(e);
        return (total_e[e] - turn_s[s] + c - 1) / c;
    }
    // Where row `at` of an expert goes, if the rows of slots begin at first_s.
    __device__ int place(int e, int at, const int *first_s) const {
        const int c = count(e);
        return first_s[slot_x[first_e[e] + at % c]] + at / c;
    }
};

// Sums of the histograms into total_e, and of those before `boundary` into before_e; V experts per load.
template <int V>
__device__ __forceinline__ void add_histograms(const int *hist_be, int blocks, int boundary, int experts,
                                               int *total_e, int *before_e) {
    const int loads = experts / V, threads = blockDim.x, teams = max(1, threads / loads);
    for (int u = threadIdx.x; u < loads * teams; u += threads) {
        const int at = u % loads, team = u / loads;
        int total[V] = {}, before[V] = {};
#pragma unroll 2  // more do not fit in the registers beside the rows on their way
        for (int b = team; b < blocks; b += teams) {
            int count[V];
            const int *from = hist_be + (size_t)b * experts + at * V;
            if constexpr (V == 4) {
                const int4 four = *reinterpret_cast<const int4 *>(from);
                count[0] = four.x, count[1] = four.y, count[2] = four.z, count[3] = four.w;
            } else {
                count[0] = *from;
            }
#pragma unroll
            for (int v = 0; v < V; v++) total[v] += count[v], before[v] += b < boundary ? count[v] : 0;
        }
#pragma unroll
        for (int v = 0; v < V; v++) {
            atomicAdd(&total_e[at * V + v], total[v]);
            atomicAdd(&before_e[at * V + v], before[v]);
        }
    }
}

// total_e becomes the sum of the totals before e within its 32 experts; part: the sum of each 32.
__device__ __forceinline__ void scan_totals(int *total_e, int *part, int experts, int *n_send_e) {
    const int lane = threadIdx.x & 31;
    for (int base = threadIdx.x & ~31; base < experts; base += blockDim.x) {
        const int e = base + lane, own = e < experts ? total_e[e] : 0;
        int sum = own;
#pragma unroll
        for (int far = 1; far < 32; far <<= 1) {
            const int other = __shfl_up_sync(ALL, sum, far);
            if (lane >= far) sum += other;
        }
        if (lane == 31) part[base >> 5] = sum;
        if (e < experts) {
            total_e[e] = sum - own;
            if (blockIdx.x == 0) n_send_e[e] = own;
        }
    }
}

// The slots of the share's pairs, into shared memory (from its first row on) and slot_tk. Returns them.
__device__ __forceinline__ const int *find_slots(const Share &s, const int *expert_tk, const int *hist_be, int *slot_tk,
                                                 int *n_send_e, int k, int experts, int hist_blocks, int rows_per_hist,
                                                 const int *copies, int copy_slots) {
    CUDACPU_DYNAMIC_SHARED(int, shared);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, rankers = min(RANKERS, (int)blockDim.x >> 5);
    int *total_e = shared, *before_e = total_e + experts, *next_we = before_e + experts;
    int *part = next_we + rankers * experts, *first_s = part + 16, *slot = first_s + (copies ? copy_slots : 0);
    const Turns turns(copies, experts, copy_slots);
    for (int i = threadIdx.x; i < (2 + rankers) * experts; i += blockDim.x) shared[i] = 0;
    __syncthreads();
    // Pairs from the boundary of histograms before the first row: each ranking warp has a run of them.
    const int boundary = s.row / rows_per_hist, first = boundary * rows_per_hist * k, end = s.row_end * k;
    const int run = ((end - first + rankers - 1) / rankers + 31) & ~31;
    const int mine = first + warp * run, mine_end = warp < rankers ? min(mine + run, end) : mine;
    int *next_e = next_we + (warp < rankers ? warp : 0) * experts;
    for (int p = mine + lane; p < mine_end; p += 32) atomicAdd(&next_e[expert_tk[p]], 1);
    if (experts % 4 == 0) add_histograms<4>(hist_be, hist_blocks, boundary, experts, total_e, before_e);
    else add_histograms<1>(hist_be, hist_blocks, boundary, experts, total_e, before_e);
    __syncthreads();
    if (copies) {
        for (int s = threadIdx.x; s < copy_slots; s += blockDim.x) first_s[s] = turns.rows(s, total_e);
        __syncthreads();
    }
    scan_totals(copies ? first_s : total_e, part, copies ? copy_slots : experts, n_send_e);
    __syncthreads();
    if (copies)
        for (int s = threadIdx.x; s < copy_slots; s += blockDim.x)
            for (int i = 0; i < s >> 5; i++) first_s[s] += part[i];
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
        int next = before_e[e];  // among the expert's rows, if it has copies
        if (!copies) {
            next += total_e[e];
            for (int i = 0; i < e >> 5; i++) next += part[i];
        }
        for (int w = 0; w < rankers; w++) {
            const int count = next_we[w * experts + e];
            next_we[w * experts + e] = next;
            next += count;
        }
    }
    __syncthreads();
    for (int base = mine; base < mine_end; base += 32) {
        const int p = base + lane, e = p < mine_end ? expert_tk[p] : -1;
        const unsigned same = __match_any_sync(ALL, e);
        const int rank = __popc(same & ((1u << lane) - 1));
        int at = e >= 0 ? next_e[e] + rank : 0;
        __syncwarp();
        if (e >= 0 && rank == 0) next_e[e] += __popc(same);
        __syncwarp();
        const int t = p / k;
        if (e < 0 || t < s.row) continue;
        if (copies) at = turns.place(e, at, first_s);
        slot[p - s.row * k] = at;
        if (t * s.chunks >= s.first) slot_tk[p] = at;  // of a row shared with the block before, that one writes it
    }
    __syncthreads();
    return slot;
}

// A warp's 16-byte loads of up to CHUNK elements of one row, and their stores to the row's k slots.
__device__ __forceinline__ void load_chunk(uint4 (&part)[LOADS], const T *x_td, int item, int chunks, int d) {
    const int t = item / chunks, from = (item - t * chunks) * (CHUNK / 8) + (threadIdx.x & 31);
    const uint4 *row = reinterpret_cast<const uint4 *>(x_td + (size_t)t * d);
#pragma unroll
    for (int i = 0; i < LOADS; i++)
        if (from + 32 * i < d / 8) part[i] = row[from + 32 * i];
}

__device__ __forceinline__ void store_chunk(const uint4 (&part)[LOADS], T *x_sd, const int *slot, int item, int chunks,
                                            int first_row, int d, int k) {
    const int t = item / chunks, from = (item - t * chunks) * (CHUNK / 8) + (threadIdx.x & 31);
    for (int i = 0; i < k; i++) {
        uint4 *row = reinterpret_cast<uint4 *>(x_sd + (size_t)slot[(t - first_row) * k + i] * d);
#pragma unroll
        for (int j = 0; j < LOADS; j++)
            if (from + 32 * j < d / 8) row[from + 32 * j] = part[j];
    }
}

extern "C" __global__ void __launch_bounds__(1024) permute(PARAMETERS) {
    const Share s = share_of(row_count(rows, most), (d + CHUNK - 1) / CHUNK);
    if (s.first >= s.end && blockIdx.x > 0) return;  // block 0 stays: it writes n_send_e
    const int lane = threadIdx.x & 31, warps = blockDim.x >> 5, mine = s.first + (threadIdx.x >> 5);
    const bool wide = d % 8 == 0;
    uint4 part[LOADS];
    if (wide && mine < s.end) load_chunk(part, x_td, mine, s.chunks, d);  // on its way while the slots are found
    const int *slot = find_slots(s, SLOT_ARGUMENTS);
    T *out = static_cast<T *>(x_sd);
    for (int item = mine; item < s.end; item += warps) {
        if (wide) {
            if (item > mine) load_chunk(part, x_td, item, s.chunks, d);
            store_chunk(part, out, slot, item, s.chunks, s.row, d, k);
            continue;
        }
        const int t = item / s.chunks, from = (item - t * s.chunks) * CHUNK;
        for (int at = from + lane; at < min(from + CHUNK, d); at += 32) {
            const T value = x_td[(size_t)t * d + at];
            for (int i = 0; i < k; i++) out[(size_t)slot[(t - s.row) * k + i] * d + at] = value;
        }
    }
}

// One row as e4m3 to its k slots, by one warp: once over it for its scale (a NaN has no say), again,
// from the cache, to convert it.
__device__ __forceinline__ void row_to_fp8(const T *x_d, unsigned char *x_sw, const int *slot, int d, int k, size_t width) {
    const int lane = threadIdx.x & 31, eights = d % 8 ? 0 : d / 8;
    const uint4 *x = reinterpret_cast<const uint4 *>(x_d);
    float most = 0.0f;
#pragma unroll 4
    for (int i = lane; i < eights; i += 32) {
        Eight in;
        in.bits = x[i];
#pragma unroll
        for (int j = 0; j < 8; j++) most = fmaxf(most, fabsf(to_float(in.t[j])));
    }
    for (int i = eights * 8 + lane; i < d; i += 32) most = fmaxf(most, fabsf(to_float(x_d[i])));
#pragma unroll
    for (int far = 16; far; far >>= 1) most = fmaxf(most, __shfl_xor_sync(ALL, most, far));
    const float scale = most > 0.0f ? most / E4M3_MOST : 1.0f;
    for (int i = lane; i < eights; i += 32) {
        Eight in;
        in.bits = x[i];
        unsigned two[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            two[j] = __nv_cvt_float2_to_fp8x2(make_float2(to_float(in.t[2 * j]) / scale, to_float(in.t[2 * j + 1]) / scale),
                                              __NV_SATFINITE, __NV_E4M3);
        const uint2 out = make_uint2(two[0] | two[1] << 16, two[2] | two[3] << 16);
        for (int c = 0; c < k; c++) reinterpret_cast<uint2 *>(x_sw + slot[c] * width)[i] = out;
    }
    for (int i = eights * 8 + lane; i < (int)width - 16; i += 32) {
        const unsigned char out = i < d ? __nv_cvt_float_to_fp8(to_float(x_d[i]) / scale, __NV_SATFINITE, __NV_E4M3) : 0;
        for (int c = 0; c < k; c++) x_sw[slot[c] * width + i] = out;
    }
    for (int c = lane; c < k; c += 32)
        *reinterpret_cast<uint4 *>(x_sw + slot[c] * width + width - 16) = make_uint4(__float_as_uint(scale), 0, 0, 0);
}

extern "C" __global__ void __launch_bounds__(1024) permute_fp8(PARAMETERS) {
    const Share s = share_of(row_count(rows, most), 1);
    if (s.first >= s.end && blockIdx.x > 0) return;
    const int *slot = find_slots(s, SLOT_ARGUMENTS);
    const size_t width = (size_t)(d + 15) / 16 * 16 + 16;
    for (int t = s.first + (threadIdx.x >> 5); t < s.end; t += blockDim.x >> 5)
        row_to_fp8(x_td + (size_t)t * d, static_cast<unsigned char *>(x_sd), slot + (t - s.row) * k, d, k, width);
}

__device__ __forceinline__ void sixteen_from_fp8(T (&out)[16], uint4 in, float scale) {
    const unsigned word[4] = {in.x, in.y, in.z, in.w};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(word[i / 2] >> 16 * (i % 2) & 0xffff, __NV_E4M3);
        out[2 * i] = to_t(__half2float(__half(__half_raw{raw.x})) * scale);
        out[2 * i + 1] = to_t(__half2float(__half(__half_raw{raw.y})) * scale);
    }
}

// A thread takes 16 bytes at a time.
extern "C" __global__ void __launch_bounds__(256) unpack_fp8(const unsigned char *x_iw, T *out_id, const int *rows, int most,
                                                             int d) {
    const unsigned units = (d + 15) / 16, all = units * row_count(rows, most);
    const size_t width = (size_t)units * 16 + 16;
    for (unsigned u = blockIdx.x * blockDim.x + threadIdx.x; u < all; u += gridDim.x * blockDim.x) {
        const unsigned i = u / units, from = (u - i * units) * 16;
        const unsigned char *row = x_iw + i * width;
        const float scale = *reinterpret_cast<const float *>(row + width - 16);
        union {
            T t[16];
            uint4 half[2];
        } out;
        sixteen_from_fp8(out.t, *reinterpret_cast<const uint4 *>(row + from), scale);
        T *to = out_id + (size_t)i * d + from;
        if (d % 8 == 0) {
            *reinterpret_cast<uint4 *>(to) = out.half[0];
            if (from + 8 < d) *reinterpret_cast<uint4 *>(to + 8) = out.half[1];
        } else {
#pragma unroll
            for (int j = 0; j < 16; j++)
                if (from + j < d) to[j] = out.t[j];
        }
    }
}
