// The next token of each row and its log-probability: one block per row, no sort of the vocabulary.
//
// Greedy rows and given tokens take one pass over the row. A row that draws takes one more, which sorts the
// logits into bins by their distance from the largest and adds up how many there are and what probability
// they hold, in integers (units of 2^-61 of the total), so that the order of the additions does not matter.
// From the bins follows where the top_k-th token, the end of the nucleus and the drawn token lie; only the
// bin in question is gathered, put in order (falling logit, then rising index) and walked through.
#include "sample_row.cuh"

// ---- the list
struct Part {  // tokens of bins first..last whose orders are in low..high: their number, and the totals before them
    int first, last;
    u64 low, high;
    u32 n, count;
    u64 mass;
};

__device__ __forceinline__ bool inside(const Row &r, const Part &p, float x, u64 order) {
    const int bin = bin_of(r, x);
    return bin >= p.first && bin <= p.last && order >= p.low && order <= p.high;
}

// Makes a part of too many tokens smaller until it fits into the list; the token sought stays inside.
__device__ void narrow(Shared &s, const Row &r, Part &p, bool by_count, u64 goal) {
    u64 low = ~0ull, high = 0;
    each(r, [&](int i, float x) {
        const u64 order = order_of(x, i);
        if (inside(r, p, x, order)) low = min(low, order), high = max(high, order);
    });
    p.low = reduce(low, [](u64 a, u64 b) { return min(a, b); });
    p.high = reduce(high, [](u64 a, u64 b) { return max(a, b); });
    u64 *mass = s.list;
    u32 *count = reinterpret_cast<u32 *>(s.list + DIGITS);
    while (p.n > LIST) {
        int shift = 0;
        while ((p.high - p.low) >> shift >= DIGITS) shift++;
        clear(count, mass, DIGITS);
        each(r, [&](int i, float x) {
            const u64 order = order_of(x, i);
            if (!inside(r, p, x, order)) return;
            atomicAdd(count + ((order - p.low) >> shift), 1u);
            add(mass + ((order - p.low) >> shift), mass_of(r, x));
        });
        accumulate(count, mass, DIGITS);
        const int digit = exceeds(s, count, mass, DIGITS, by_count, goal - (by_count ? p.count : p.mass));
        const u32 ahead = digit ? count[digit - 1] : 0;
        p.n = count[digit] - ahead;
        p.count += ahead;
        p.mass += digit ? mass[digit - 1] : 0;
        p.low += u64(digit) << shift;
        p.high = min(p.high, p.low + ((1ull << shift) - 1));
        __syncthreads();
    }
}

// Puts a part of at most LIST tokens into the list, in order.
__device__ void gather(Shared &s, const Row &r, const Part &p) {
    if (threadIdx.x == 0) s.filled = 0;
    __syncthreads();
    each(r, [&](int i, float x) {
        const u64 order = order_of(x, i);
        if (!inside(r, p, x, order)) return;
        const u32 place = atomicAdd(&s.filled, 1u);
        if (place < LIST) s.list[place] = order;
    });
    int length = 1;
    while (length < int(p.n)) length *= 2;
    for (int i = p.n + threadIdx.x; i < length; i += blockDim.x) s.list[i] = ~0ull;
    __syncthreads();
    for (int run = 2; run <= length; run *= 2)  // bitonic sort
        for (int step = run / 2; step; step /= 2) {
            for (int pair = threadIdx.x; pair < length / 2; pair += blockDim.x) {
                const int i = 2 * pair - (pair & (step - 1));
                const u64 a = s.list[i], b = s.list[i + step];
                if ((a > b) == ((i & run) == 0)) s.list[i] = b, s.list[i + step] = a;
            }
            __syncthreads();
        }
}

// The first token of the list whose running total exceeds the goal; that total of masses is in s.through.
__device__ void walk(Shared &s, const Row &r, const Part &p, bool by_count, u64 goal) {
    u64 mass = p.mass;
    const int lane = threadIdx.x;
    for (int base = 0; lane < 32 && base < int(p.n); base += 32) {
        const int i = base + lane;
        u64 m = i < int(p.n) ? mass_of(r, logit_of(s.list[i])) : 0;
        for (int d = 1; d < 32; d <<= 1) {
            const u64 left = __shfl_up_sync(0xffffffffu, m, d);
            if (lane >= d) m += left;
        }
        m += mass;
        const u32 found = __ballot_sync(0xffffffffu, i < int(p.n) && (by_count ? u64(p.count) + i + 1 : m) > goal);
        if (found && lane == __ffs(found) - 1) s.through = m, s.token = u32(s.list[i]);
        if (found) break;
        mass = __shfl_sync(0xffffffffu, m, 31);
    }
    __syncthreads();
}

// The first token in order up to which count or mass exceeds the goal, and the mass up to it: s.token, s.through.
// `p` is what the list holds (p.last < 0: nothing of use), before and after.
__device__ void find(Shared &s, const Row &r, Part &p, bool by_count, u64 goal) {
    __syncthreads();
    const int bin = exceeds(s, s.count, s.mass, BINS, by_count, goal);
    if (bin < p.first || bin > p.last) {
        const bool all = s.count[bin] <= LIST;  // the bins before fit as well: what is sought next may be there
        const int first = all ? 0 : bin;
        const u32 ahead = first ? s.count[first - 1] : 0;
        p = {first, bin, 0, ~0ull, s.count[bin] - ahead, ahead, first ? s.mass[first - 1] : 0};
        if (p.n > LIST) narrow(s, r, p, by_count, goal);
        gather(s, r, p);
    }
    walk(s, r, p, by_count, goal);
    if (p.low > 0) p.last = -1;  // part of a bin only
}

// ---- a row
// The last token in order: what an index of -1 picks in the sampler where the probabilities are not a number.
__device__ int last_token(const Row &r) {
    u64 worst = 0;
    each(r, [&](int i, float x) { worst = max(worst, isnan(x) ? 0xffffffffull << 32 | u32(i) : order_of(x, i)); });
    return int(u32(reduce(worst, [](u64 a, u64 b) { return max(a, b); })));
}

template <class U> __device__ int draw(Shared &s, const Row &r, int top_k, const double *top_p, U random) {
    clear(s.count, s.mass, BINS);
    u64 far_mass = 0;
    u32 far_count = 0;
    each(r, [&](int i, float x) {
        const int bin = bin_of(r, x);
        const u64 mass = mass_of(r, x);
        if (bin == BINS - 1) {
            far_count++, far_mass += mass;
        } else {
            atomicAdd(s.count + bin, 1u);
            add(s.mass + bin, mass);
        }
    });
    far_count = reduce(far_count, [](u32 a, u32 b) { return a + b; });
    far_mass = reduce(far_mass, [](u64 a, u64 b) { return a + b; });
    if (threadIdx.x == 0) s.count[BINS - 1] = far_count, s.mass[BINS - 1] = far_mass;
    accumulate(s.count, s.mass, BINS);
    Part part = {0, -1, 0, 0, 0, 0, 0};
    u64 total = s.mass[BINS - 1];
    if (top_k > 0 && top_k < r.vocab) {
        find(s, r, part, true, top_k - 1);
        total = s.through;
    }
    if (!(*top_p >= 1)) {  // the fewest tokens that hold top_p of it, at least one
        const double wanted = *top_p * double(total);
        find(s, r, part, false, wanted > 1 ? min(u64(ceil(wanted)), total) - 1 : 0);
        total = s.through;
    }
    find(s, r, part, false, min(u64(random() * double(total)), total - 1));
    return s.token;
}

// temperature 0: the first of the largest logits. given >= 0: this token. logprob: under the plain softmax.
extern "C" __global__ void __launch_bounds__(1024)
sample(const float *__restrict__ logit_nv, const float *__restrict__ bias_v, int vocab,
       const double *__restrict__ temperature_n, const int *__restrict__ top_k_n, const double *__restrict__ top_p_n,
       const u64 *__restrict__ seed_n, const u64 *__restrict__ request_n, const u64 *__restrict__ position_n,
       const int *__restrict__ given_n, int *__restrict__ token_n, double *__restrict__ logprob_n,
       const int *__restrict__ rows, int most) {
    const int n = blockIdx.x;
    if (n >= row_count(rows, most)) return;
    __shared__ Shared s;
    const double temperature = temperature_n[n];
    const bool draws = given_n[n] < 0 && temperature > 0;
    Row r = {logit_nv + size_t(n) * vocab, bias_v, vocab, 0.f, 0.f, fmin(1 / temperature, 1e308), 0.};
    // The sums run with the largest logit so far; a NaN counts as the largest of all, as in argmax.
    const float rate = draws ? float(fmin(r.inverse_t, 3e38)) : 0.f;
    u64 best = ~0ull;
    float top = LOWEST, low = -MINUS_INF, rough = 0.f;  // rough: the sum at this temperature, to choose the unit
    double sum = 0;
    each(r, [&](int i, float x) {
        best = min(best, isnan(x) ? u64(i) : order_of(x, i));
        low = fminf(low, x);
        if (x > top) {
            sum *= expf(top - x);
            rough *= __expf((top - x) * rate);
            top = x;
        }
        sum += expf(x - top);
        rough += __expf((x - top) * rate);
    });
    best = reduce(best, [](u64 a, u64 b) { return min(a, b); });
    low = reduce(low, [](float a, float b) { return fminf(a, b); });
    r.largest = reduce(top, [](float a, float b) { return fmaxf(a, b); });
    sum = reduce(sum * exp(double(top) - double(r.largest)), [](double a, double b) { return a + b; });
    int token = given_n[n];
    if (token < 0) token = int(u32(best));
    if (draws) {
        rough = reduce(rough * __expf((top - r.largest) * rate), [](float a, float b) { return a + b; });
        if (!(rough >= 1.f && rough <= float(vocab))) rough = float(vocab);
        r.unit = ldexp(1., 61 - ilogbf(2 * rough));
        const bool none = !(sum > 0) || isinf(r.largest / temperature) || (isinf(temperature) && low == MINUS_INF);
        r.bin_scale = fminf(BINS / fminf(SPAN * float(fmin(temperature, 1e38)), r.largest - low), 1e37f);
        token = none ? last_token(r) : draw(s, r, top_k_n[n], top_p_n + n, [&] { return uniform(seed_n[n], request_n[n], position_n[n]); });
    }
    if (threadIdx.x > 0) return;
    token_n[n] = token;
    logprob_n[n] = token < vocab ? double(value(r, token)) - double(r.largest) - log(sum) : double(MINUS_INF - MINUS_INF);
}
