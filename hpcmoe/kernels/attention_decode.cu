// Attention of single rows (decode), one for each sequence: keys and values are read once for all query heads of a
// KV head, by as many blocks as `splits` says; combine adds up their parts.
#include "attention.cuh"

#define SHORTEST 4  // chunks of 16 positions that a split has at least, where the row is that long

// The positions that a row sees, in chunks of 16; each of `active` splits has `per` of them (the last one the rest).
struct Span {
    int first, last, chunk0, chunks, per, active;
    __device__ __forceinline__ Span(int position, int window, int splits) {
        last = position;
        first = window > 0 ? max(0, position + 1 - window) : 0;
        chunk0 = first / 16;
        chunks = last / 16 + 1 - chunk0;
        per = max(SHORTEST, (chunks + splits - 1) / splits);
        active = (chunks + per - 1) / per;
    }
};

#define DECODE_PARAMETERS                                                                                             \
    const T *q_thc, const T *k_phoc, const T *v_phoc, const int *page_sp, const int *slot_t, const int *position_t,   \
        const int *decode_b, const int *n_decode, int most, T *out_thc, float *part, int heads, int kv_heads, int hd, \
        int page_tokens, int pages, int window, int splits
#define DECODE_ARGUMENTS                                                                                        \
    q_thc, k_phoc, v_phoc, page_sp, slot_t, position_t, decode_b, n_decode, most, out_thc, part, heads, kv_heads, \
        hd, page_tokens, pages, window, splits

// Block (row, KV head, split): up to 16 query heads of one KV head are the 16 rows of the tensor cores' matrices.
// Its warps take chunks in turn, each with its own softmax and two stages of keys and values. HD is head_dim where
// EXACT, at least that elsewhere: the columns that are too many hold zeros.
template <int HD, int WARPS, bool EXACT> __device__ __forceinline__ void decode(DECODE_PARAMETERS) {
    if (EXACT) hd = HD;
    constexpr int STAGE = 16 * (HD + 8);  // elements
    CUDACPU_DYNAMIC_SHARED(unsigned char, memory);
    if ((int)blockIdx.x >= row_count(n_decode, most)) return;
    const int t = decode_b[blockIdx.x], split = blockIdx.z;
    const Span span(position_t[t], window, splits);
    if (split >= span.active) return;
    const int group = heads / kv_heads, parts = (group + 15) / 16;
    const int kv = blockIdx.y / parts, within = blockIdx.y % parts * 16, mine = min(16, group - within);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const size_t head0 = (size_t)t * heads + kv * group + within;

    T *query = (T *)aligned(memory), *stages = query + STAGE + warp * 4 * STAGE;
    float *stats = (float *)(query + STAGE + WARPS * 4 * STAGE);  // at the end: base and sum of each row
    float *scale_r = stats + warp * 32;
    const Cache cache = {k_phoc, v_phoc, page_sp + (size_t)slot_t[t] * pages, kv_heads, kv, page_tokens, hd};
    const int begin = span.chunk0 + split * span.per;
    const int end = min(begin + span.per, span.chunk0 + span.chunks);

    fetch<16, HD, WARPS * 32, 16>(query, threadIdx.x, hd, 0, mine, [&](int row) { return q_thc + (head0 + row) * hd; });
    end_copies();
    auto fetch_chunk = [&](int chunk, size_t place, T *stage) {
        if (chunk < end) {
            const int from = span.first - chunk * 16, to = span.last + 1 - chunk * 16;
            const T *key = k_phoc + place, *value = v_phoc + place;
            auto key_at = [&](int row) { return key + row * hd; };
            auto value_at = [&](int row) { return value + row * hd; };
            if (from <= 0 && to >= 16) {  // as almost all are: without a look at each row
                fetch<16, HD, 32, 16>(stage, lane, hd, 0, 16, key_at);
                fetch<16, HD, 32, 16>(stage + STAGE, lane, hd, 0, 16, value_at);
            } else {
                fetch<16, HD, 32, 1>(stage, lane, hd, from, to, key_at);
                fetch<16, HD, 32, 1>(stage + STAGE, lane, hd, from, to, value_at);
            }
        }
        end_copies();
    };
    auto place_of = [&](int chunk) { return chunk < end ? cache.place(chunk * 16) : 0; };
    Sums out[HD / 16];
#pragma unroll
    for (int c = 0; c < HD / 16; c++) wmma::fill_fragment(out[c], 0.0f);
    float base = MINUS_INF, sum = 0.0f;
    int chunk = begin + warp, stage = 0;
    fetch_chunk(chunk, place_of(chunk), stages);
    const unsigned rows = rows_of_sums((float *)(stages + 2 * STAGE));
    size_t next = place_of(chunk + WARPS);
    wait_copies<1>();
    __syncthreads();
    for (; chunk < end; chunk += WARPS, stage ^= 1) {
        fetch_chunk(chunk + WARPS, next, stages + (stage ^ 1) * 2 * STAGE);
        next = place_of(chunk + 2 * WARPS);
        wait_copies<1>();
        __syncwarp();
        T *key = stages + stage * 2 * STAGE;
        float *score = (float *)key;  // the scores take the place of the keys
        Sums s[2];
        wmma::fill_fragment(s[0], 0.0f);
        wmma::fill_fragment(s[1], 0.0f);
#pragma unroll
        for (int k = 0; k < HD / 16; k++) {
            Rows a;
            Keys b;
            load(a, query + k * 16, HD + 8);
            load(b, key + k * 16, HD + 8);
            wmma::mma_sync(s[k % 2], a, b, s[k % 2]);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) s[0].x[i] += s[1].x[i];
        __syncwarp();
        wmma::store_matrix_sync(score, s[0], 24, wmma::mem_row_major);
        __syncwarp();
        const bool rescale =
            softmax<16>(score, scale_r, base, sum, span.first - chunk * 16, span.last + 1 - chunk * 16);
        add_values<16, HD>(out, (const T *)score, key + STAGE, scale_r, rows, rescale);
        __syncwarp();
    }

    float *mixed = (float *)stages;  // 16 x HD of each warp
#pragma unroll
    for (int c = 0; c < HD / 16; c++) wmma::store_matrix_sync(mixed + c * 16, out[c], HD, wmma::mem_row_major);
    if (lane % 2 == 0) {
        scale_r[lane / 2] = base;
        scale_r[16 + lane / 2] = sum;
    }
    __syncthreads();
    mixed = (float *)(query + STAGE);
    const size_t part0 = (size_t)blockIdx.x * heads + kv * group + within;
    for (int i = threadIdx.x; i < mine * hd; i += WARPS * 32) {
        const int g = i / hd, c = i - g * hd;
        float top = MINUS_INF, total = 0.0f, weights = 0.0f;
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, stats[w * 32 + g]);
        const float zero = top == MINUS_INF ? 0.0f : top;
        for (int w = 0; w < WARPS; w++) {
            const float scale = __expf(stats[w * 32 + g] - zero);
            total += scale * mixed[w * 2 * STAGE + g * HD + c];
            weights += scale * stats[w * 32 + 16 + g];
        }
        if (span.active == 1) {
            out_thc[(head0 + g) * hd + c] = to_t(total / weights);
        } else {
            const size_t at = (part0 + g) * splits + split;
            part[at * hd + c] = total;
            if (c == 0) {
                float *stat = part + (size_t)most * heads * splits * hd + at * 2;
                stat[0] = top;
                stat[1] = weights;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(128, 4) decode_64(DECODE_PARAMETERS) {
    decode<64, 4, true>(DECODE_ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(128, 3) decode_128(DECODE_PARAMETERS) {
    decode<128, 4, true>(DECODE_ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(128, 3) decode_any_128(DECODE_PARAMETERS) {
    decode<128, 4, false>(DECODE_ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(64, 3) decode_any_256(DECODE_PARAMETERS) {
    decode<256, 2, false>(DECODE_ARGUMENTS);
}

// Block (row, head): adds up what the splits of a row left in `part`, in their order.
extern "C" __global__ void __launch_bounds__(128)
    combine(const float *part, const int *position_t, const int *decode_b, const int *n_decode, int most, T *out_thc,
            int heads, int hd, int window, int splits) {
    if ((int)blockIdx.x >= row_count(n_decode, most)) return;
    const int t = decode_b[blockIdx.x];
    const Span span(position_t[t], window, splits);
    if (span.active == 1) return;
    const size_t at = ((size_t)blockIdx.x * heads + blockIdx.y) * splits;
    const float *stat = part + (size_t)most * heads * splits * hd + at * 2;
    float top = MINUS_INF, weights = 0.0f;
    for (int s = 0; s < span.active; s++) top = fmaxf(top, stat[2 * s]);
    const float zero = top == MINUS_INF ? 0.0f : top;
    for (int s = 0; s < span.active; s++) weights += __expf(stat[2 * s] - zero) * stat[2 * s + 1];
    for (int c = threadIdx.x; c < hd; c += blockDim.x) {
        float total = 0.0f;
        for (int s = 0; s < span.active; s++) total += __expf(stat[2 * s] - zero) * part[(at + s) * hd + c];
        out_thc[((size_t)t * heads + blockIdx.y) * hd + c] = to_t(total / weights);
    }
}
