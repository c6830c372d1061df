// Attention for training: packed sequences, forward and backward (FlashAttention-2, Dao 2023), without atomics.
//
// A sequence is a range of tokens that sees itself causally and, before that, all tokens of a prefix range (prefix length 0:
// none), which several sequences may share. Whoever shares a prefix follows it in T without a gap, in any order, so that the
// queries that see a key are one range of tokens too: those from the key on, up to the end of its sequence, or of the last
// sequence that has it in its prefix. Every token is in one sequence, and every key in one key tile.
//
// The tables of tiles are the host's. Blocks start in their order, so tiles with much work belong first.
//
// It is compiled behind train_tiles.cu, which has the products of tiles.
//
// Scores are made twice on the way back, once by query tile (attend_dq) and once by key tile (attend_dkv), which needs no
// atomics, so that the sums are in the same order every time. In both, what one product leaves in registers is laid out as
// the next one's operand; attend_dkv therefore computes the scores transposed.

// Query tokens of a tile of `attend` and `attend_dq`, keys of a tile of `attend_dkv`, for heads of any size.
#define TILE 128
#define LOG2_E 1.4426950408889634f

struct TrainAttention {
    const bf16* qkv;          // [T, (Q + 2K)·D] after bias, norm and rotation: queries, keys, values
    const int4* sequences;    // [S] first token, tokens, first token of the prefix, tokens of the prefix
    const int2* query_tiles;  // [query tiles] sequence, first token of the tile within the sequence
    const int4* key_tiles;    // [key tiles] first key, keys (≤ TILE, of one sequence), end of the tokens that see them, 0
    bf16* out;                // [T, Q·D]
    float* lse;               // [Q, T] natural log of the sum of exponentials of the scaled scores
    const bf16* dout;         // [T, Q·D]
    float* delta;             // [Q, T] dout · out of a token and head; attend_dq writes it, attend_dkv reads it
    bf16* dqkv;               // [T, (Q + 2K)·D]; attend_dq writes the first Q·D columns
    float* dkv;               // [splits, T, 2K·D]: keys, then values; attend_dkv writes all of it
    int tokens, q_heads, kv_heads;
    int splits;               // parts that the query heads of a key head are divided into, 1 to Q / K; for small T
    float scale;              // 1/√D
};

// Aligned for the swizzle, whose pattern goes by the address.
extern __shared__ __align__(1024) uint4 space[];

static __device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(FULL, x, 1);
    return x + __shfl_xor_sync(FULL, x, 2);
}
static __device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL, x, 2));
}

// A tile of queries of one head, and the keys it sees: those of the prefix, then those of its sequence, numbered from 0.
struct QueryTile {
    int4 sequence;
    int offset, first, rows, head, kv_head;

    __device__ __forceinline__ QueryTile(const TrainAttention& p) {
        int2 tile = p.query_tiles[blockIdx.y];
        sequence = p.sequences[tile.x];
        offset = tile.y, first = sequence.x + tile.y, rows = min(TILE, sequence.y - tile.y);
        head = blockIdx.x, kv_head = head / (p.q_heads / p.kv_heads);
    }
    __device__ __forceinline__ int keys() const { return sequence.w + offset + rows; }
    // Last key that query `row` of the tile sees.
    __device__ __forceinline__ int limit(int row) const { return sequence.w + offset + row; }
    __device__ __forceinline__ int query(int row) const { return row < rows ? first + row : -1; }
    __device__ __forceinline__ int key(int index) const {
        int token = index < sequence.w ? sequence.z + index : sequence.x + index - sequence.w;
        return index < keys() ? token : -1;
    }
};

// Rows of a warp, as bf16 times factor[m][half], by way of its own rows of a tile in shared memory, which nobody needs any more.
template <int D, int M>
static __device__ __forceinline__ void put_rows(const float (*d)[D / 8][4], const float (*factor)[2], bf16* tile, int row, bf16* to,
                                                int stride, int rows) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // Another warp of the warpgroup may still be reading them.
    if (GROUPED<D>) __syncthreads();
    else __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                *(u32*)(tile + place<D, TILE>(row + 16 * m + 8 * h + g, n) + 2 * t) =
                    pack(d[m][n][2 * h] * factor[m][h], d[m][n][2 * h + 1] * factor[m][h]);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 16 * M * D / 8; j += 32) {
        int i = lane + j, r = row + i / (D / 8), chunk = i % (D / 8);
        if (r < rows) *(uint4*)(to + (size_t)r * stride + chunk * 8) = *(const uint4*)(tile + place<D, TILE>(r, chunk));
    }
}

// Running softmax of 16 · M rows (Milakov & Gimelshein 2018); s: scores of N · 8 keys, weights afterwards. If `masked`, the first
// row sees no key beyond `limit`, counted from the first of these, and the others accordingly more. Every row sees the first key
// that it is ever shown.
template <int M, int N>
struct Softmax {
    float top[M][2], sum[M][2];

    __device__ __forceinline__ Softmax() {
#pragma unroll
        for (int m = 0; m < M; m++) top[m][0] = top[m][1] = NEG_INF, sum[m][0] = sum[m][1] = 0.f;
    }
    // shrink: what sums so far are to be multiplied by. Returns whether that changes anything in this warp.
    __device__ __forceinline__ bool weigh(float (*s)[N][4], bool masked, int limit, float scale, float (*shrink)[2]) {
        int t = threadIdx.x % 4;
        bool changed = false;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float now = top[m][h];
                if (masked)
#pragma unroll
                    for (int n = 0; n < N; n++)
#pragma unroll
                        for (int i = 0; i < 2; i++)
                            if (8 * n + 2 * t + i > limit + 16 * m + 8 * h) s[m][n][2 * h + i] = NEG_INF;
#pragma unroll
                for (int n = 0; n < N; n++) now = fmaxf(now, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                now = quad_max(now);
                shrink[m][h] = exp2_fast((top[m][h] - now) * scale);
                changed |= now != top[m][h];
                top[m][h] = now;
                float part = 0.f, base = now * scale;
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        part += s[m][n][2 * h + i] = exp2_fast(s[m][n][2 * h + i] * scale - base);
                sum[m][h] = sum[m][h] * shrink[m][h] + part;
            }
        return __any_sync(FULL, changed);
    }
};

template <int M, int N>
static __device__ __forceinline__ void rescale(float (*o)[N][4], const float (*by)[2]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) o[m][n][i] *= by[m][i / 2];
}

// STEP: keys in shared memory at a time, twice; M: 16 rows each that a warp has; PART: keys whose scores are alive. With wgmma
// PART is STEP, and the values of a step are multiplied while the next one's softmax is computed, as in FlashAttention-3
// (Shah et al. 2024); so values are fetched a step later than keys.
template <int D, int STEP, int M, int PART>
static __device__ __forceinline__ void attend(const TrainAttention& p) {
    constexpr int THREADS = TILE / (16 * M) * 32, N = PART / 8;
    bf16 *queries = (bf16*)space, *keys = queries + TILE * D, *values = keys + 2 * STEP * D;
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M, g = lane / 4, t = lane % 4;
    int first_row = GROUPED<D> ? row / 64 * 64 : row, last_row = first_row + (GROUPED<D> ? 64 : 16 * M) - 1;
    let_next_start();
    wait_for_previous();
    QueryTile tile(p);
    int width = (p.q_heads + 2 * p.kv_heads) * D, steps = (tile.keys() + STEP - 1) / STEP;
    const bf16 *key_head = p.qkv + (p.q_heads + tile.kv_head) * D, *value_head = key_head + p.kv_heads * D;
    auto fetch = [&](bf16* to, const bf16* from, int step) {
        if (step < steps)
            fetch_rows<D, STEP, THREADS>(to + step % 2 * STEP * D, from, width, [&](int r) { return tile.key(step * STEP + r); });
    };
    fetch_rows<D, TILE, THREADS>(queries, p.qkv + tile.head * D, width, [&](int r) { return tile.query(r); });
    fetch(keys, key_head, 0);
    Softmax<M, N> softmax;
    Left<M, N> weights;
    float o[M][D / 8][4], s[M][N][4], shrink[M][2], scale = p.scale * LOG2_E;
    clear<M, D / 8>(o);
    auto weigh = [&](int from) {
        return softmax.weigh(s, from + PART - 1 > tile.limit(first_row), tile.limit(row + g) - from, scale, shrink);
    };
    if constexpr (GROUPED<D>) {
        static_assert(PART == STEP, "one product of scores a step");
        // Rows beyond the tile see no more than it does: both warpgroups have to come to the same barriers.
        int seen = min(tile.limit(last_row) / STEP + 1, steps), step = 0;
        auto next = [&] {
            arrived();
            fetch(keys, key_head, step + 1);
            fetch(values, value_head, step);
        };
        next();
        times_rows<D, TILE, STEP, M, N>(s, queries, row, keys, 0);
        finish<D>();
        weigh(0);
        weights.pack_from(s);
        for (step = 1; step < seen; step++) {
            next();
            times_rows<D, TILE, STEP, M, N>(s, queries, row, keys + step % 2 * STEP * D, 0);
            times_columns<D, STEP, M, N>(o, weights, values + (step + 1) % 2 * STEP * D, 0);
            finish<D, 1>();
            weigh(step * STEP);
            finish<D>();
            weights.keep();
            rescale<M, D / 8>(o, shrink);
            weights.pack_from(s);
        }
        next();
        times_columns<D, STEP, M, N>(o, weights, values + (step + 1) % 2 * STEP * D, 0);
        finish<D>();
        weights.keep();
        // The other warpgroup sees more.
        for (step++; step <= steps; step++) next();
    } else {
        fetch(values, value_head, 0);
        for (int step = 0; step < steps; step++) {
            arrived();
            fetch(keys, key_head, step + 1);
            fetch(values, value_head, step + 1);
#pragma unroll
            for (int part = 0; part < STEP; part += PART) {
                int from = step * STEP + part;
                if (from > tile.limit(last_row)) break;
                times_rows<D, TILE, STEP, M, N>(s, queries, row, keys + step % 2 * STEP * D, part);
                if (weigh(from)) rescale<M, D / 8>(o, shrink);
                weights.pack_from(s);
                times_columns<D, STEP, M, N>(o, weights, values + step % 2 * STEP * D, part);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = quad_sum(softmax.sum[m][h]);
            int r = row + 16 * m + 8 * h + g;
            if (t == 0 && r < tile.rows)
                p.lse[(size_t)tile.head * p.tokens + tile.first + r] = softmax.top[m][h] * p.scale + __logf(sum);
            shrink[m][h] = 1.f / sum;
        }
    put_rows<D, M>(o, shrink, queries, row, p.out + ((size_t)tile.first * p.q_heads + tile.head) * D, p.q_heads * D, tile.rows);
}

// dout · out of the rows of a tile, which a quad each has; left in p.delta and returned for the rows of this lane.
template <int D, int M>
static __device__ __forceinline__ void row_products(const TrainAttention& p, const QueryTile& tile, const bf16* douts, int row,
                                                    float (*delta)[2]) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int r = row + 16 * m + 8 * h + g;
            float sum = 0.f;
            if (r < tile.rows) {
                const bf16* out = p.out + ((size_t)(tile.first + r) * p.q_heads + tile.head) * D;
#pragma unroll
                for (int c = t; c < D / 8; c += 4) {
                    uint4 a = load16(out + 8 * c), b = *(const uint4*)(douts + place<D, TILE>(r, c));
                    sum += low(a.x) * low(b.x) + high(a.x) * high(b.x) + low(a.y) * low(b.y) + high(a.y) * high(b.y);
                    sum += low(a.z) * low(b.z) + high(a.z) * high(b.z) + low(a.w) * low(b.w) + high(a.w) * high(b.w);
                }
            }
            delta[m][h] = quad_sum(sum);
            if (t == 0 && r < tile.rows) p.delta[(size_t)tile.head * p.tokens + tile.first + r] = delta[m][h];
        }
}

// As `attend`: dQ = scale · dS · K.
template <int D, int STEP, int M, int PART>
static __device__ __forceinline__ void attend_dq(const TrainAttention& p) {
    constexpr int THREADS = TILE / (16 * M) * 32, N = PART / 8;
    bf16 *queries = (bf16*)space, *douts = queries + TILE * D, *keys = douts + TILE * D, *values = keys + 2 * STEP * D;
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M, g = lane / 4, t = lane % 4;
    int first_row = GROUPED<D> ? row / 64 * 64 : row, last_row = first_row + (GROUPED<D> ? 64 : 16 * M) - 1;
    let_next_start();
    wait_for_previous();
    QueryTile tile(p);
    int width = (p.q_heads + 2 * p.kv_heads) * D;
    const bf16 *key_head = p.qkv + (p.q_heads + tile.kv_head) * D, *value_head = key_head + p.kv_heads * D;
    auto fetch = [&](int from) {
        auto token = [&](int r) { return tile.key(from + r); };
        fetch_rows<D, STEP, THREADS>(keys + from / STEP % 2 * STEP * D, key_head, width, token);
        fetch_rows<D, STEP, THREADS>(values + from / STEP % 2 * STEP * D, value_head, width, token);
    };
    auto query = [&](int r) { return tile.query(r); };
    fetch_rows<D, TILE, THREADS>(queries, p.qkv + tile.head * D, width, query);
    fetch_rows<D, TILE, THREADS>(douts, p.dout + tile.head * D, p.q_heads * D, query);
    fetch(0);
    float dq[M][D / 8][4], delta[M][2], base[M][2], scale = p.scale * LOG2_E;
    clear<M, D / 8>(dq);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int token = tile.query(row + 16 * m + 8 * h + g);
            base[m][h] = token < 0 ? 0.f : p.lse[(size_t)tile.head * p.tokens + token] * LOG2_E;
        }
    for (int from = 0; from < tile.keys(); from += STEP) {
        arrived();
        if (from == 0) row_products<D, M>(p, tile, douts, row, delta);
        if (from + STEP < tile.keys()) fetch(from + STEP);
        const bf16 *k = keys + from / STEP % 2 * STEP * D, *v = values + from / STEP % 2 * STEP * D;
#pragma unroll
        for (int part = 0; part < STEP; part += PART) {
            if (from + part > tile.limit(last_row)) break;
            float s[M][N][4], dp[M][N][4];
            times_rows<D, TILE, STEP, M, N>(s, queries, row, k, part);
            times_rows<D, TILE, STEP, M, N>(dp, douts, row, v, part);
            finish<D, 1>();
            bool masked = from + part + PART - 1 > tile.limit(first_row);
            int limit = tile.limit(row + g) - from - part - 2 * t;
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        s[m][n][i] = exp2_fast(s[m][n][i] * scale - base[m][i / 2]);
                        if (masked && 8 * n + i % 2 > limit + 16 * m + i / 2 * 8) s[m][n][i] = 0.f;
                    }
            finish<D>();
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) dp[m][n][i] = s[m][n][i] * (dp[m][n][i] - delta[m][i / 2]);
            Left<M, N> gradient;
            gradient.pack_from(dp);
            times_columns<D, STEP, M, N>(dq, gradient, k, part);
            finish<D>();
            gradient.keep();
        }
    }
    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) factor[m][0] = factor[m][1] = p.scale;
    put_rows<D, M>(dq, factor, queries, row, p.dqkv + (size_t)tile.first * width + tile.head * D, width, tile.rows);
}

// A tile of keys, and the query heads of a split: all queries of the first head, then of the next. Each warp has 16 · M keys;
// STEP queries are in shared memory at a time, twice, with their lse and delta; PART: queries whose scores are alive.
// dV = Pᵀ · dO, dK = scale · dSᵀ · Q.
template <int D, int STEP, int M, int PART>
static __device__ __forceinline__ void attend_dkv(const TrainAttention& p) {
    constexpr int THREADS = TILE / (16 * M) * 32, N = PART / 8;
    bf16 *keys = (bf16*)space, *values = keys + TILE * D, *queries = values + TILE * D, *douts = queries + 2 * STEP * D;
    float* sums = (float*)(douts + 2 * STEP * D);  // [2] of lse and delta, [STEP] each
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M, g = lane / 4, t = lane % 4;
    int first_row = GROUPED<D> ? row / 64 * 64 : row, last_row = first_row + (GROUPED<D> ? 64 : 16 * M) - 1;
    let_next_start();
    wait_for_previous();
    int4 tile = p.key_tiles[blockIdx.y];
    int kv_head = blockIdx.x / p.splits, split = blockIdx.x % p.splits, group = p.q_heads / p.kv_heads;
    int head0 = kv_head * group + group * split / p.splits, head1 = kv_head * group + group * (split + 1) / p.splits;
    int width = (p.q_heads + 2 * p.kv_heads) * D, steps = (tile.z - tile.x + STEP - 1) / STEP;
    auto fetch = [&](int step) {
        int head = head0 + step / steps, first = tile.x + step % steps * STEP, slot = step % 2;
        auto token = [&](int r) { return first + r < tile.z ? first + r : -1; };
        fetch_rows<D, STEP, THREADS>(queries + slot * STEP * D, p.qkv + head * D, width, token);
        fetch_rows<D, STEP, THREADS>(douts + slot * STEP * D, p.dout + head * D, p.q_heads * D, token);
        if (threadIdx.x < 2 * STEP) {
            int r = threadIdx.x % STEP, at = max(token(r), 0);
            const float* from = threadIdx.x < STEP ? p.lse : p.delta;
            fetch4(sums + slot * 2 * STEP + threadIdx.x, from + (size_t)head * p.tokens + at, token(r) >= 0);
        }
    };
    auto key = [&](int r) { return r < tile.y ? tile.x + r : -1; };
    fetch_rows<D, TILE, THREADS>(keys, p.qkv + (p.q_heads + kv_head) * D, width, key);
    fetch_rows<D, TILE, THREADS>(values, p.qkv + (p.q_heads + p.kv_heads + kv_head) * D, width, key);
    fetch(0);
    float dk[M][D / 8][4], dv[M][D / 8][4], scale = p.scale * LOG2_E;
    clear<M, D / 8>(dk);
    clear<M, D / 8>(dv);
    for (int step = 0; step < steps * (head1 - head0); step++) {
        arrived();
        if (step + 1 < steps * (head1 - head0)) fetch(step + 1);
        int first = step % steps * STEP, slot = step % 2;
        const bf16 *q = queries + slot * STEP * D, *dout = douts + slot * STEP * D;
        const float *lse = sums + slot * 2 * STEP, *delta = lse + STEP;
#pragma unroll
        for (int part = 0; part < STEP; part += PART) {
            if (first + part + PART - 1 < first_row) continue;
            float s[M][N][4], dp[M][N][4];
            times_rows<D, TILE, STEP, M, N>(s, keys, row, q, part);
            times_rows<D, TILE, STEP, M, N>(dp, values, row, dout, part);
            finish<D, 1>();
            bool masked = first + part < last_row;
            int limit = row + g - first - part - 2 * t;
#pragma unroll
            for (int n = 0; n < N; n++) {
                float2 l = *(const float2*)(lse + part + 8 * n + 2 * t);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        s[m][n][i] = exp2_fast(s[m][n][i] * scale - (i % 2 ? l.y : l.x) * LOG2_E);
                        if (masked && 8 * n + i % 2 < limit + 16 * m + i / 2 * 8) s[m][n][i] = 0.f;
                    }
            }
            Left<M, N> weights, gradient;
            weights.pack_from(s);
            times_columns<D, STEP, M, N>(dv, weights, dout, part);
            finish<D, 1>();
#pragma unroll
            for (int n = 0; n < N; n++) {
                float2 d = *(const float2*)(delta + part + 8 * n + 2 * t);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) dp[m][n][i] = s[m][n][i] * (dp[m][n][i] - (i % 2 ? d.y : d.x));
            }
            gradient.pack_from(dp);
            times_columns<D, STEP, M, N>(dk, gradient, q, part);
            finish<D>();
            weights.keep(), gradient.keep();
        }
    }
    float* to = p.dkv + ((size_t)split * p.tokens + tile.x) * 2 * p.kv_heads * D + kv_head * D;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int r = row + 16 * m + 8 * h + g;
            if (r >= tile.y) continue;
            float *k = to + (size_t)r * 2 * p.kv_heads * D + 2 * t, *v = k + p.kv_heads * D;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                *(float2*)(k + 8 * n) = make_float2(dk[m][n][2 * h] * p.scale, dk[m][n][2 * h + 1] * p.scale);
                *(float2*)(v + 8 * n) = make_float2(dv[m][n][2 * h], dv[m][n][2 * h + 1]);
            }
        }
}

// For D = 32, 64, 96, 128:
//   attend_D      out and lse. Grid (Q, query tiles).
//   attend_dq_D   delta, and the queries' part of dqkv, from out, lse and dout. Grid (Q, query tiles).
//   attend_dkv_D  dkv, after attend_dq_D. Grid (K · splits, key tiles).
// Threads: as many as the function allows. Bytes of dynamic shared memory, at most 99 KiB but on Hopper, which is what GPUs of 8.6
// and 8.9 have:
//   D             32     64     96    128   128 on Hopper (9.0)
//   attend     24576  49152  73728  98304   98304
//   attend_dq  32768  65536  98304  98304  131072
//   attend_dkv 33792  66560  99328  98816  132096
// Shapes are STEP, M, PART and the blocks that a multiprocessor has to have registers for, by measurement on an H200 (also those
// without wgmma).
#define KERNEL(KIND, D, STEP, M, PART, BLOCKS)                                                    \
    extern "C" __global__ void __launch_bounds__(TILE / (16 * M) * 32, BLOCKS)                    \
        KIND##_##D(const __grid_constant__ TrainAttention p) {                                    \
        KIND<D, STEP, M, PART>(p);                                                                \
    }
KERNEL(attend, 32, 64, 2, 64, 1)
KERNEL(attend_dq, 32, 64, 2, 32, 1)
KERNEL(attend_dkv, 32, 64, 2, 32, 1)
KERNEL(attend, 96, 64, 2, 32, 1)
KERNEL(attend_dq, 96, 64, 1, 32, 1)
KERNEL(attend_dkv, 96, 64, 1, 32, 1)
#if WARPGROUPS
KERNEL(attend, 64, 64, 1, 64, 2)
KERNEL(attend_dq, 64, 64, 1, 32, 2)
KERNEL(attend_dkv, 64, 64, 1, 64, 1)
KERNEL(attend, 128, 64, 1, 64, 1)
KERNEL(attend_dq, 128, 64, 1, 64, 1)
KERNEL(attend_dkv, 128, 64, 1, 64, 1)
#else
KERNEL(attend, 64, 64, 2, 64, 1)
KERNEL(attend_dq, 64, 64, 2, 32, 1)
KERNEL(attend_dkv, 64, 64, 1, 64, 1)
KERNEL(attend, 128, 64, 2, 64, 1)
KERNEL(attend_dq, 128, 32, 2, 32, 1)
KERNEL(attend_dkv, 128, 32, 1, 32, 1)
#endif
