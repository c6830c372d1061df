// Attention for training: packed sequences, forward and backward (FlashAttention-2, Dao 2023), without atomics.
//
// A sequence is a range of tokens that sees itself causally and, before that, all tokens of a prefix range (prefix length 0:
// none), which several sequences may share. Whoever shares a prefix follows it in T without a gap, in any order, so that the
// queries that see a key are one range of tokens too: those from the key on, up to the end of its sequence, or of the last
// sequence that has it in its prefix. Every token is in one sequence, and every key in one key tile.
//
// The tables of tiles are the host's. Blocks start in their order, so tiles with much work belong first.
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

extern __shared__ uint4 space[];

// Where 8 neighbours of a row of a tile in shared memory are: chunks change places so that 8 rows of a column, which
// ldmatrix reads, lie in different banks.
template <int D>
static __device__ __forceinline__ int place(int row, int chunk) {
    return row * D + (chunk ^ (D % 64 ? row >> 1 & 3 : row & 7)) * 8;
}
static __device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 or 4 bytes on their way to shared memory; zeros where there is nothing to read.
static __device__ __forceinline__ void fetch16(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
static __device__ __forceinline__ void fetch4(void* to, const void* from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address(to)), "l"(from), "r"(there ? 4 : 0) : "memory");
}
// What this thread has fetched so far is there; after a barrier, what all have.
static __device__ __forceinline__ void arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ROWS rows of D numbers to a tile; row r is token(r) of `from`, zeros if that is negative.
template <int D, int ROWS, int THREADS, typename Token>
static __device__ __forceinline__ void fetch_rows(bf16* to, const bf16* from, int stride, Token token) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * D / 8; i += THREADS) {
        int row = i / (D / 8), chunk = i % (D / 8), at = token(row);
        fetch16(to + place<D>(row, chunk), from + (size_t)max(at, 0) * stride + chunk * 8, at >= 0);
    }
}

static __device__ __forceinline__ void load_matrices(u32 r[4], const bf16* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(p)) : "memory");
}
static __device__ __forceinline__ void load_transposed(u32 r[4], const bf16* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(p)) : "memory");
}

// a[16×16] of `mma`: rows from `row`, columns from 16 · k.
template <int D>
static __device__ __forceinline__ void load_a(u32 a[4], const bf16* tile, int row, int k) {
    int lane = threadIdx.x % 32;
    load_matrices(a, tile + place<D>(row + lane % 16, 2 * k + lane / 16));
}

// d[m][n] += a · bᵀ over D, for N · 8 rows of `b` from `row`; `a` gives the operand of rows m and step k.
template <int D, int M, int N, typename A>
static __device__ __forceinline__ void times_rows(float (*d)[N][4], A a, const bf16* b, int row) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        u32 left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) a(left[m], m, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 right[4];
            load_matrices(right, b + place<D>(row + 8 * n + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma(d[m][n], left[m][0], left[m][1], left[m][2], left[m][3], right[0], right[1]);
                mma(d[m][n + 1], left[m][0], left[m][1], left[m][2], left[m][3], right[2], right[3]);
            }
        }
    }
}

// d[m][D] += a · b, `a` as times_rows has left it, N · 8 columns, over that many rows of `b` from `row`.
template <int D, int M, int N>
static __device__ __forceinline__ void times_columns(float (*d)[D / 8][4], const float (*a)[N][4], const bf16* b, int row) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        u32 left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
            left[m][0] = pack(a[m][2 * k][0], a[m][2 * k][1]), left[m][1] = pack(a[m][2 * k][2], a[m][2 * k][3]);
            left[m][2] = pack(a[m][2 * k + 1][0], a[m][2 * k + 1][1]), left[m][3] = pack(a[m][2 * k + 1][2], a[m][2 * k + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            u32 right[4];
            load_transposed(right, b + place<D>(row + 16 * k + lane % 16, n + lane / 16));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma(d[m][n], left[m][0], left[m][1], left[m][2], left[m][3], right[0], right[1]);
                mma(d[m][n + 1], left[m][0], left[m][1], left[m][2], left[m][3], right[2], right[3]);
            }
        }
    }
}

template <int M, int N>
static __device__ __forceinline__ void clear(float (*d)[N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++) d[m][n][0] = d[m][n][1] = d[m][n][2] = d[m][n][3] = 0.f;
}

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

// Rows of a warp, bf16, by way of its own rows of a tile in shared memory. d: as mma leaves it, times factor[m][half].
template <int D, int M>
static __device__ __forceinline__ void put_rows(const float (*d)[D / 8][4], const float (*factor)[2], bf16* tile, int row, bf16* to,
                                                int stride, int rows) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                *(u32*)(tile + place<D>(row + 16 * m + 8 * h + g, n) + 2 * t) =
                    pack(d[m][n][2 * h] * factor[m][h], d[m][n][2 * h + 1] * factor[m][h]);
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * M * D / 8; i += 32) {
        int r = row + i / (D / 8), chunk = i % (D / 8);
        if (r < rows) *(uint4*)(to + (size_t)r * stride + chunk * 8) = *(const uint4*)(tile + place<D>(r, chunk));
    }
}

// Running softmax of 16 · M rows (Milakov & Gimelshein 2018); s: scores of N · 8 keys, weights afterwards. Keys beyond
// limit[m][h], counted from the first of these, are masked if `masked`. Every row sees the first key it is shown.
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

// STEP: keys in shared memory at a time, twice; M: 16 rows each that a warp has; PART: keys whose scores are alive.
template <int D, int STEP, int M, int PART>
static __device__ __forceinline__ void attend(const TrainAttention& p) {
    constexpr int THREADS = TILE / (16 * M) * 32, N = PART / 8;
    bf16 *queries = (bf16*)space, *keys = queries + TILE * D, *values = keys + 2 * STEP * D;
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M, g = lane / 4, t = lane % 4;
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
    fetch_rows<D, TILE, THREADS>(queries, p.qkv + tile.head * D, width, [&](int r) { return tile.query(r); });
    fetch(0);
    Softmax<M, N> softmax;
    float o[M][D / 8][4], shrink[M][2];
    clear<M, D / 8>(o);
    float scale = p.scale * LOG2_E;
    for (int from = 0; from < tile.keys(); from += STEP) {
        arrived();
        __syncthreads();
        if (from + STEP < tile.keys()) fetch(from + STEP);
        const bf16 *k = keys + from / STEP % 2 * STEP * D, *v = values + from / STEP % 2 * STEP * D;
#pragma unroll
        for (int part = 0; part < STEP; part += PART) {
            if (from + part > tile.limit(row + 16 * M - 1)) break;
            float s[M][N][4];
            clear<M, N>(s);
            times_rows<D, M, N>(s, [&](u32 a[4], int m, int i) { load_a<D>(a, queries, row + 16 * m, i); }, k, part);
            bool masked = from + part + PART - 1 > tile.limit(row);
            if (softmax.weigh(s, masked, tile.limit(row + g) - from - part, scale, shrink)) {
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int n = 0; n < D / 8; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++) o[m][n][i] *= shrink[m][i / 2];
            }
            times_columns<D, M, N>(o, s, v, part);
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
                    uint4 a = load16(out + 8 * c), b = *(const uint4*)(douts + place<D>(r, c));
                    sum += low(a.x) * low(b.x) + high(a.x) * high(b.x) + low(a.y) * low(b.y) + high(a.y) * high(b.y);
                    sum += low(a.z) * low(b.z) + high(a.z) * high(b.z) + low(a.w) * low(b.w) + high(a.w) * high(b.w);
                }
            }
            delta[m][h] = quad_sum(sum);
            if (t == 0 && r < tile.rows) p.delta[(size_t)tile.head * p.tokens + tile.first + r] = delta[m][h];
        }
}

// dS = P · (dP − delta) from scores s and dp, into dp, where P = exp(s − lse). base: lse in powers of two.
template <int M, int N>
static __device__ __forceinline__ void score_gradient(const float (*s)[N][4], float (*dp)[N][4], bool masked, int limit,
                                                      float scale, const float (*base)[2], const float (*delta)[2]) {
    int t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float weight = exp2_fast(s[m][n][i] * scale - base[m][i / 2]);
                if (masked && 8 * n + 2 * t + i % 2 > limit + 16 * m + i / 2 * 8) weight = 0.f;
                dp[m][n][i] = weight * (dp[m][n][i] - delta[m][i / 2]);
            }
}

// As `attend`: dQ = scale · dS · K.
template <int D, int STEP, int M, int PART>
static __device__ __forceinline__ void attend_dq(const TrainAttention& p) {
    constexpr int THREADS = TILE / (16 * M) * 32, N = PART / 8;
    bf16 *queries = (bf16*)space, *douts = queries + TILE * D, *keys = douts + TILE * D, *values = keys + 2 * STEP * D;
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M, g = lane / 4;
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
        __syncthreads();
        if (from == 0) row_products<D, M>(p, tile, douts, row, delta);
        if (from + STEP < tile.keys()) fetch(from + STEP);
        const bf16 *k = keys + from / STEP % 2 * STEP * D, *v = values + from / STEP % 2 * STEP * D;
#pragma unroll
        for (int part = 0; part < STEP; part += PART) {
            if (from + part > tile.limit(row + 16 * M - 1)) break;
            float s[M][N][4], dp[M][N][4];
            clear<M, N>(s);
            clear<M, N>(dp);
            times_rows<D, M, N>(s, [&](u32 a[4], int m, int i) { load_a<D>(a, queries, row + 16 * m, i); }, k, part);
            times_rows<D, M, N>(dp, [&](u32 a[4], int m, int i) { load_a<D>(a, douts, row + 16 * m, i); }, v, part);
            bool masked = from + part + PART - 1 > tile.limit(row);
            score_gradient<M, N>(s, dp, masked, tile.limit(row + g) - from - part, scale, base, delta);
            times_columns<D, M, N>(dq, dp, k, part);
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
        __syncthreads();
        if (step + 1 < steps * (head1 - head0)) fetch(step + 1);
        int first = step % steps * STEP, slot = step % 2;
        const bf16 *q = queries + slot * STEP * D, *dout = douts + slot * STEP * D;
        const float *lse = sums + slot * 2 * STEP, *delta = lse + STEP;
#pragma unroll
        for (int part = 0; part < STEP; part += PART) {
            if (first + part + PART - 1 < row) continue;
            float s[M][N][4], dp[M][N][4];
            clear<M, N>(s);
            clear<M, N>(dp);
            times_rows<D, M, N>(s, [&](u32 a[4], int m, int i) { load_a<D>(a, keys, row + 16 * m, i); }, q, part);
            times_rows<D, M, N>(dp, [&](u32 a[4], int m, int i) { load_a<D>(a, values, row + 16 * m, i); }, dout, part);
            bool masked = first + part < row + 16 * M - 1;
#pragma unroll
            for (int n = 0; n < N; n++) {
                float2 l = *(const float2*)(lse + part + 8 * n + 2 * t), d = *(const float2*)(delta + part + 8 * n + 2 * t);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float weight = exp2_fast(s[m][n][i] * scale - (i % 2 ? l.y : l.x) * LOG2_E);
                        if (masked && first + part + 8 * n + 2 * t + i % 2 < row + 16 * m + i / 2 * 8 + g) weight = 0.f;
                        s[m][n][i] = weight;
                        dp[m][n][i] = weight * (dp[m][n][i] - (i % 2 ? d.y : d.x));
                    }
            }
            times_columns<D, M, N>(dv, s, dout, part);
            times_columns<D, M, N>(dk, dp, q, part);
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
// Threads and bytes of dynamic shared memory, at most 99 KiB, which is what GPUs of 8.6 and 8.9 have:
//   D                 32          64          96         128
//   attend       128, 24576  128, 49152  128, 73728  128, 98304
//   attend_dq    128, 32768  128, 65536  128, 98304  128, 98304
//   attend_dkv   128, 33792  128, 66560  256, 99328  256, 98816
#define KERNELS(D, FORWARD, BACKWARD, DQ_M, DQ_PART, DKV_M, DKV_PART)                                                      \
    extern "C" __global__ void __launch_bounds__(128) attend_##D(const __grid_constant__ TrainAttention p) {               \
        attend<D, 64, 2, FORWARD>(p);                                                                                      \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256 / DQ_M) attend_dq_##D(const __grid_constant__ TrainAttention p) {     \
        attend_dq<D, BACKWARD, DQ_M, DQ_PART>(p);                                                                          \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256 / DKV_M) attend_dkv_##D(const __grid_constant__ TrainAttention p) {   \
        attend_dkv<D, BACKWARD, DKV_M, DKV_PART>(p);                                                                       \
    }
KERNELS(32, 64, 64, 2, 64, 2, 32)
KERNELS(64, 64, 64, 2, 32, 2, 32)
KERNELS(96, 64, 64, 2, 32, 1, 32)
KERNELS(128, 32, 32, 2, 32, 1, 32)
