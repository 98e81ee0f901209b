// Attention of prefill chunks: up to 64 rows of one sequence and one query head for each block.
#include "attention.cuh"

#define ROWS_MOST 64
#define WARPS 4  // 16 rows each

// Block tile * heads + head; tile_w4: first row, rows, slot, position of the first row. KEYS positions at a time: the
// next keys come in while the weights meet the values, the next values while the queries meet the keys.
// HD is head_dim where EXACT, at least that elsewhere: the columns that are too many hold zeros.
template <int HD, int KEYS, bool EXACT>
__device__ __forceinline__ void prefill(const T *q_thc, const T *k_phoc, const T *v_phoc, const int *page_sp,
                                        const int *tile_w4, const int *n_tiles, int most, T *out_thc, int heads,
                                        int kv_heads, int hd, int page_tokens, int pages, int window) {
    if (EXACT) hd = HD;
    CUDACPU_DYNAMIC_SHARED(unsigned char, memory);
    const int tile = blockIdx.x / heads, head = blockIdx.x - tile * heads;
    if (tile >= row_count(n_tiles, most)) return;
    const int t0 = tile_w4[tile * 4], tile_rows = tile_w4[tile * 4 + 1], slot = tile_w4[tile * 4 + 2];
    const int first = tile_w4[tile * 4 + 3], last = first + tile_rows - 1;  // positions
    const int low = window > 0 ? max(0, first + 1 - window) : 0;            // the first that any row sees
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    T *query = (T *)aligned(memory), *key = query + ROWS_MOST * (HD + 8), *value = key + KEYS * (HD + 8);
    float *scores = (float *)(value + KEYS * (HD + 8)), *score = scores + warp * 16 * (KEYS + 8);
    float *scale_r = scores + WARPS * 16 * (KEYS + 8) + warp * 16;
    const Cache cache = {k_phoc, v_phoc, page_sp + (size_t)slot * pages, kv_heads, head / (heads / kv_heads),
                         page_tokens, hd};

    // Lane g < KEYS / 16 knows the place of the block's positions 16 g.. in the cache.
    auto place_of = [&](int block) {
        const int position = block * KEYS + lane * 16;
        return lane < KEYS / 16 && position + 15 >= low && position <= last ? cache.place(position) : 0;
    };
    auto fetch_block = [&](T *shared, const T *cache_phoc, int block, size_t place) {
        auto row_at = [&](int row) {
            return cache_phoc + __shfl_sync(ALL, (unsigned long long)place, row / 16) + row % 16 * hd;
        };
        const int position0 = block * KEYS;
        if (position0 <= last)
            fetch<KEYS, HD, WARPS * 32, 2>(shared, threadIdx.x, hd, low - position0, last + 1 - position0, row_at);
        end_copies();
    };
    int block = low / KEYS;
    size_t place = place_of(block);
    fetch<ROWS_MOST, HD, WARPS * 32, 2>(query, threadIdx.x, hd, 0, tile_rows, [&](int row) {
        return q_thc + ((size_t)(t0 + row) * heads + head) * hd;
    });
    fetch_block(key, k_phoc, block, place);
    fetch_block(value, v_phoc, block, place);

    const unsigned rows = rows_of_sums(score);
    Sums out[HD / 16];
#pragma unroll
    for (int c = 0; c < HD / 16; c++) wmma::fill_fragment(out[c], 0.0f);
    float base = MINUS_INF, sum = 0.0f;
    const int warp_first = first + warp * 16, warp_last = min(warp_first + 15, last), position = warp_first + lane / 2;
    for (; block * KEYS <= last; block++) {
        // Blocks that no row of this warp sees, and warps without rows, take part in copies and barriers only.
        const bool seen = warp_first <= last && block * KEYS <= warp_last &&
                          (window <= 0 || block * KEYS + KEYS - 1 > warp_first - window);
        place = place_of(block + 1);
        wait_copies<1>();
        __syncthreads();
        if (seen) {
            Sums s[KEYS / 16];
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) wmma::fill_fragment(s[n], 0.0f);
#pragma unroll
            for (int k = 0; k < HD / 16; k++) {
                Rows a;
                load(a, query + warp * 16 * (HD + 8) + k * 16, HD + 8);
#pragma unroll
                for (int n = 0; n < KEYS / 16; n++) {
                    Keys b;
                    load(b, key + n * 16 * (HD + 8) + k * 16, HD + 8);
                    wmma::mma_sync(s[n], a, b, s[n]);
                }
            }
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++)
                wmma::store_matrix_sync(score + n * 16, s[n], KEYS + 8, wmma::mem_row_major);
        }
        __syncthreads();
        fetch_block(key, k_phoc, block + 1, place);
        bool rescale = false;
        if (seen) {
            const int from = window > 0 ? position + 1 - window - block * KEYS : 0;
            rescale = softmax<KEYS>(score, scale_r, base, sum, from, position + 1 - block * KEYS);
        }
        wait_copies<1>();
        __syncthreads();
        if (seen) add_values<KEYS, HD>(out, (const T *)score, value, scale_r, rows, rescale);
        __syncthreads();
        fetch_block(value, v_phoc, block + 1, place);
    }

    float *mixed = (float *)query + warp * 16 * HD;  // queries, keys and values are no longer needed
#pragma unroll
    for (int c = 0; c < HD / 16; c++) wmma::store_matrix_sync(mixed + c * 16, out[c], HD, wmma::mem_row_major);
    scale_r[lane / 2] = sum;
    __syncwarp();
    for (int i = lane; i < 16 * (HD / 8); i += 32) {
        const int row = i / (HD / 8), column = i % (HD / 8) * 8;
        if (column >= hd || warp * 16 + row >= tile_rows) continue;
        const float whole = 1.0f / scale_r[row];
        Eight eight;
#pragma unroll
        for (int j = 0; j < 8; j++) eight.t[j] = to_t(mixed[row * HD + column + j] * whole);
        *(uint4 *)(out_thc + ((size_t)(t0 + warp * 16 + row) * heads + head) * hd + column) = eight.bits;
    }
}

#define PREFILL_PARAMETERS                                                                                           \
    const T *q_thc, const T *k_phoc, const T *v_phoc, const int *page_sp, const int *tile_w4, const int *n_tiles,    \
        int most, T *out_thc, int heads, int kv_heads, int hd, int page_tokens, int pages, int window
#define PREFILL_ARGUMENTS                                                                                            \
    q_thc, k_phoc, v_phoc, page_sp, tile_w4, n_tiles, most, out_thc, heads, kv_heads, hd, page_tokens, pages, window

extern "C" __global__ void __launch_bounds__(128, 4) prefill_64(PREFILL_PARAMETERS) {
    prefill<64, 64, true>(PREFILL_ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(128, 3) prefill_128(PREFILL_PARAMETERS) {
    prefill<128, 64, true>(PREFILL_ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(128, 3) prefill_any_128(PREFILL_PARAMETERS) {
    prefill<128, 64, false>(PREFILL_ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(128, 2) prefill_any_256(PREFILL_PARAMETERS) {
    prefill<256, 32, false>(PREFILL_ARGUMENTS);
}
