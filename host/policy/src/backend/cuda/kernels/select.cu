// Tokens by rank: sums of weights over a row of logits, and the token at which a sum is reached, in the order of ids or of the
// ranking, without sorting. For one block of 32 warps. Put before draw.cu.
//
// A token has a distance, top − logit, whose bits rise with it: its key. Tokens rank by (key, id). Its weight is
// exp(−distance / temperature) · 2^44, rounded to a whole number: sums do not depend on their order, and what rounds to 0
// is never drawn. The ranking is searched by thresholds in eighths and the sums below each.

// Warps of a block. Also its lanes: sums of warps are summed by one.
#define WARPS 32
#define ONE 17592186044416.f
#define FARTHEST 0x7f800000u

static __device__ __forceinline__ u64 warp_sum(u64 x) {
#pragma unroll
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(FULL, x, o);
    return x;
}

// Up to 8 sums over the warp; lane l has that of v[l / 4]. Each exchange halves what a lane keeps, which takes a quarter of
// the shuffles of 8 sums for themselves.
template <int N>
static __device__ __forceinline__ u64 warp_sums(const u64 (&v)[N]) {
    static_assert(N <= 8, "one sum for four lanes");
    int lane = threadIdx.x % 32;
    u64 w[8];
#pragma unroll
    for (int j = 0; j < 8; j++) w[j] = j < N ? v[j] : 0;
#pragma unroll
    for (int half = 4; half; half /= 2) {
        bool upper = lane & (4 * half);
#pragma unroll
        for (int j = 0; j < half; j++) {
            u64 other = __shfl_xor_sync(FULL, upper ? w[j] : w[j + half], 4 * half);
            w[j] = (upper ? w[j + half] : w[j]) + other;
        }
    }
    w[0] += __shfl_xor_sync(FULL, w[0], 2);
    return w[0] + __shfl_xor_sync(FULL, w[0], 1);
}

// Sums over the block, for every thread.
template <int N>
static __device__ __forceinline__ void block_sums(u64 (&v)[N]) {
    __shared__ u64 part[WARPS][N], all[N];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u64 mine = N == 1 ? warp_sum(v[0]) : warp_sums(v);
    if (lane % 4 == 0 && lane / 4 < N) part[warp][lane / 4] = mine;
    __syncthreads();
    if (warp < N) {
        u64 sum = warp_sum(part[lane][warp]);
        if (lane == 0) all[warp] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = all[j];
}

// Everything about the row that its tokens are measured by.
struct Scale {
    float top, scale;  // scale: log2(e) / temperature

    __device__ __forceinline__ u32 key(float logit) const { return __float_as_uint(top - logit); }
    __device__ __forceinline__ float likelihood(u32 key) const { return exp2_fast(-(__uint_as_float(key) * scale)); }
    __device__ __forceinline__ u64 weight(u32 key) const { return __float2ull_rn(likelihood(key) * ONE); }
    __device__ __forceinline__ double logprob(u32 key) const {
        return -(double)(__uint_as_float(key) * scale) * 0.6931471805599453;
    }
};

// All tokens of the row, or those that are listed; in the order of ids.
struct Whole {
    const float* x;
    int count;
    Scale at;

    template <class F>
    __device__ __forceinline__ void each(int from, int to, int stride, F f) const {
        for (int i = from; i < to; i += 4 * stride) {
            float v[4];
#pragma unroll
            for (int j = 0; j < 4; j++) v[j] = i + j * stride < to ? __ldcg(x + i + j * stride) : 0.f;
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (i + j * stride < to) f(i + j * stride, at.key(v[j]));
        }
    }
    __device__ __forceinline__ int id(int i) const { return i; }
};
struct Listed {
    const u32* keys;
    const int* ids;
    int count;

    template <class F>
    __device__ __forceinline__ void each(int from, int to, int stride, F f) const {
        for (int i = from; i < to; i += stride) f(ids[i], keys[i]);
    }
    __device__ __forceinline__ int id(int i) const { return ids[i]; }
};

// The last token that may be drawn.
struct Bound {
    u32 key;
    int id;

    __device__ __forceinline__ bool holds(int i, u32 k) const { return k < key || (k == key && i <= id); }
};

// What is summed of a token. One type for all, so that the searches below are compiled once.
enum Kind { COUNT, MASS, RESIDUAL };
struct Weight {
    Scale at;
    Bound bound;
    Kind kind;
    const float* q;   // of the residual, with the proposed token and 2^44 over the mass of what may be drawn
    int proposed;
    float inverse;

    __device__ __forceinline__ u64 operator()(int id, u32 key) const {
        if (!bound.holds(id, key)) return 0;
        if (kind != RESIDUAL) {
            u64 w = at.weight(key);
            return kind == MASS ? w : (u64)(w > 0);
        }
        float rest = at.likelihood(key) * inverse - (q ? q[id] : id == proposed ? 1.f : 0.f);
        // Probabilities in 2^-61.
        return rest > 0.f ? __float2ull_rn(rest * 2305843009213693952.f) : 0;
    }
};

template <class S>
static __device__ __noinline__ u64 total(const S s, const Weight weight) {
    u64 sum[1] = {0};
    s.each(threadIdx.x, s.count, 32 * WARPS, [&](int id, u32 key) { sum[0] += weight(id, key); });
    block_sums(sum);
    return sum[0];
}

#define ANY 0xffffffffu

// The part `share` of a total as a target, which is always below the total.
static __device__ __forceinline__ u64 part_of(u64 all, double share) {
    u64 target = (u64)((double)all * share);
    return target < all ? target : all - 1;
}

// First token, in the order of ids, with which the summed weights of tokens with key `only` exceed `target`, which all of
// them do. A `share` ≥ 0 stands for that part of their sum; -1 where that is 0.
template <class S>
static __device__ __noinline__ int in_order(const S s, const Weight weight, u64 target, u32 only, double share) {
    __shared__ u64 sums[WARPS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, low = 0, high = s.count;
    while (high - low > 1) {
        int width = (high - low + WARPS - 1) / WARPS, from = low + warp * width;
        u64 sum = 0;
        s.each(from + lane, min(high, from + width), 32, [&](int id, u32 key) {
            if (only == ANY || key == only) sum += weight(id, key);
        });
        sum = warp_sum(sum);
        if (lane == 0) sums[warp] = sum;
        __syncthreads();
        u64 mine = sums[lane], upto = mine;
#pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            u64 other = __shfl_up_sync(FULL, upto, o);
            if (lane >= o) upto += other;
        }
        if (share >= 0.0) {
            u64 all = __shfl_sync(FULL, upto, 31);
            if (all == 0) {
                __syncthreads();
                return -1;
            }
            target = part_of(all, share), share = -1.0;
        }
        int chosen = __ffs(__ballot_sync(FULL, upto > target)) - 1;
        target -= __shfl_sync(FULL, upto - mine, chosen);
        low += chosen * width;
        high = min(high, low + width);
        __syncthreads();
    }
    return s.id(low);
}

// The same in the order of the ranking, among all keys. No key with a weight is above `high`.
template <class S>
static __device__ __noinline__ Bound ranked(const S s, const Weight weight, u64 target, u32 high) {
    u32 low = 0;
    u64 below = 0;
    while (low < high) {
        u32 step = (high - low) / 8 + 1;
        u64 upto[7] = {};
        s.each(threadIdx.x, s.count, 32 * WARPS, [&](int id, u32 key) {
            if (key < low || key > high) return;
            u64 w = weight(id, key);
#pragma unroll
            for (int j = 0; j < 7; j++)
                if (key < low + (j + 1) * step) upto[j] += w;
        });
        block_sums(upto);
        u32 from = low + 7 * step, to = high;
        u64 before = upto[6];
#pragma unroll
        for (int j = 6; j >= 0; j--)
            if (below + upto[j] > target) {
                from = low + j * step;
                to = min(high, from + step - 1);
                before = j ? upto[j - 1] : 0;
            }
        low = from, high = to;
        below += before;
    }
    return {high, in_order(s, weight, target - below, high, -1.0)};
}

// Smallest sum that top-p is content with.
static __device__ __forceinline__ u64 goal_of(u64 all, float top_p) {
    u64 goal = (u64)ceil((double)all * (double)top_p);
    return goal > 1 ? min(goal, all) : 1;
}

