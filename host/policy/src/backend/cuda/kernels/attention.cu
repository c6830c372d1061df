// Paged attention for decoding, verification and prefill: softmax(q·kᵀ/√D)·v over the blocks of a sequence.
//
// The query heads that share a key head, times some query tokens, are the 16 rows of a tensor-core tile
// (FlashAttention's packed GQA); each warp takes blocks of keys in turn and keeps its own running softmax (Milakov &
// Gimelshein 2018); the warps, then the splits of a long sequence, are merged at the end (Flash-Decoding, Dao 2023).
//
// No shared memory on the way: a product may sum over k in any order if both sides use the same one. Lane (g, t)
// reads 8 neighbours in one load and takes them for k = 2t, 2t+1, 2t+8, 2t+9 of two products. Keys are numbered so
// that the scores a lane holds are those of 8 neighbours too, which is what values, stored transposed, need.

struct Attention {
    const bf16* q;          // [T, Q, D]
    const bf16* keys;       // [blocks, K, BLOCK, D]
    const bf16* values;     // [blocks, K, D, BLOCK]
    bf16* out;              // [T, Q, D]
    const int* tile_seq;    // [tiles] sequence of the tile
    const int* tile_first;  // [tiles] its first query token, within the sequence's ones
    const int* q_start;     // [S] first token of the sequence in T
    const int* q_len;       // [S] its tokens
    const int* kv_len;      // [S] keys, those of its tokens included; 0: padding
    const int* tables;      // [S, table_width]
    float* partial;         // [tiles, K, splits, 16, D + 2]; splits > 1 only
    u32* tickets;           // [tiles, K], zero before and after
    int table_width, q_heads, kv_heads;
    int splits;             // most parts of a sequence; a short one is not divided
    float scale;            // log2(e) / √D
};

// Blocks of keys that a warp reads before another split takes part: a merge costs about as much as reading three.
#define BLOCKS_PER_WARP 4

// A block of keys and values on the way from memory, as lane (g, t) has it.
template <int D>
struct KeyBlock {
    uint4 k[4][D / 32], v[D / 8];

    // The halves are loaded apart, so that the keys of the next block can be on their way while these values are used.
    __device__ __forceinline__ void load_keys(const bf16* keys) {
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int c = 0; c < D / 32; c++) k[j][c] = load16(keys + (8 * (g >> 1) + 2 * j + (g & 1)) * D + c * 32 + 8 * t);
    }
    __device__ __forceinline__ void load_values(const bf16* values) {
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int d = 0; d < D / 8; d++) v[d] = load16(values + (8 * d + g) * BLOCK + 8 * t);
    }
    // Puts a key and a value, [D] each, where those of `slot` are.
    __device__ __forceinline__ void patch_key(int slot, const bf16* key) {
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (8 * (g >> 1) + 2 * j + (g & 1) == slot)
#pragma unroll
                for (int c = 0; c < D / 32; c++) k[j][c] = *(const uint4*)(key + c * 32 + 8 * t);
    }
    __device__ __forceinline__ void patch_value(int slot, const bf16* value) {
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        if (slot / 8 != t) return;
        u32 keep = slot & 1 ? 0xffffu : 0xffff0000u;
        int shift = slot & 1 ? 16 : 0, word = slot % 8 / 2;
#pragma unroll
        for (int d = 0; d < D / 8; d++) {
            u32 x = (u32)value[8 * d + g] << shift;
            if (word == 0) v[d].x = v[d].x & keep | x;
            if (word == 1) v[d].y = v[d].y & keep | x;
            if (word == 2) v[d].z = v[d].z & keep | x;
            if (word == 3) v[d].w = v[d].w & keep | x;
        }
    }
};

// 16 query rows, of which lane (g, t) has g and g + 8.
template <int D>
struct Queries {
    u32 q[D / 32][8];

    // Row r at `row(r)`, rows from `rows` on are zeros.
    template <typename Row>
    __device__ __forceinline__ Queries(int rows, Row row) {
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const bf16* query = row(g + 8 * h);
#pragma unroll
            for (int c = 0; c < D / 32; c++) {
                uint4 x = g + 8 * h < rows ? *(const uint4*)(query + c * 32 + 8 * t) : make_uint4(0, 0, 0, 0);
                q[c][h] = x.x, q[c][2 + h] = x.y, q[c][4 + h] = x.z, q[c][6 + h] = x.w;
            }
        }
    }
};

// Running softmax of 16 rows, of which lane (g, t) has g and g + 8.
template <int D>
struct Rows {
    float o[D / 8][4], m[2], l[2];
    int limit[2];  // last key each may see

    __device__ __forceinline__ Rows() {
        m[0] = m[1] = NEG_INF, l[0] = l[1] = 0.f;
#pragma unroll
        for (int d = 0; d < D / 8; d++) o[d][0] = o[d][1] = o[d][2] = o[d][3] = 0.f;
    }

    // Scores of the keys from `first` on, and what is left of what was summed before.
    __device__ __forceinline__ void score(const Queries<D>& x, const KeyBlock<D>& b, int first, float scale, float s[4][4],
                                          float shrink[2]) {
        int t = threadIdx.x % 4;
        float top[2] = {NEG_INF, NEG_INF};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.f;
#pragma unroll
            for (int c = 0; c < D / 32; c++) {
                mma(s[j], x.q[c][0], x.q[c][1], x.q[c][2], x.q[c][3], b.k[j][c].x, b.k[j][c].y);
                mma(s[j], x.q[c][4], x.q[c][5], x.q[c][6], x.q[c][7], b.k[j][c].z, b.k[j][c].w);
            }
            int key = first + 8 * t + 2 * j;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[j][i] = key + (i & 1) <= limit[i >> 1] ? s[j][i] * scale : NEG_INF;
                top[i >> 1] = fmaxf(top[i >> 1], s[j][i]);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            top[h] = fmaxf(top[h], __shfl_xor_sync(FULL, top[h], 1));
            top[h] = fmaxf(top[h], __shfl_xor_sync(FULL, top[h], 2));
            float now = fmaxf(m[h], top[h]);
            // A row that has seen no key yet stays at -inf; its difference must not be NaN.
            shrink[h] = now == NEG_INF ? 1.f : exp2_fast(m[h] - now);
            m[h] = now;
            l[h] *= shrink[h];
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int h = i >> 1;
                s[j][i] = m[h] == NEG_INF ? 0.f : exp2_fast(s[j][i] - m[h]);
                l[h] += s[j][i];
            }
    }

    __device__ __forceinline__ void add(const KeyBlock<D>& b, const float s[4][4], const float shrink[2]) {
        u32 p[8];
#pragma unroll
        for (int j = 0; j < 4; j++) p[2 * j] = pack(s[j][0], s[j][1]), p[2 * j + 1] = pack(s[j][2], s[j][3]);
#pragma unroll
        for (int d = 0; d < D / 8; d++) {
            o[d][0] *= shrink[0], o[d][1] *= shrink[0], o[d][2] *= shrink[1], o[d][3] *= shrink[1];
            mma(o[d], p[0], p[1], p[2], p[3], b.v[d].x, b.v[d].y);
            mma(o[d], p[4], p[5], p[6], p[7], b.v[d].z, b.v[d].w);
        }
    }

    // to: [16, D + 2]: sums, largest score, sum of weights.
    __device__ __forceinline__ void put(float (*to)[D + 2]) {
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            l[h] += __shfl_xor_sync(FULL, l[h], 1);
            l[h] += __shfl_xor_sync(FULL, l[h], 2);
            float* row = to[g + 8 * h];
#pragma unroll
            for (int d = 0; d < D / 8; d++) *(float2*)(row + 8 * d + 2 * t) = make_float2(o[d][2 * h], o[d][2 * h + 1]);
            if (t == 0) row[D] = m[h], row[D + 1] = l[h];
        }
    }
};

// What Rows::put needs for each warp, 64 · (D + 2) bytes. Of dynamic size, because a fixed one may only be 48 KB.
extern __shared__ float2 space[];

// A row of some parts together: lane l has the values c · 32 + l, not yet divided by the sum of weights.
template <int D>
struct Merged {
    float value[D / 32], top, sum;

    // One warp. The row of part k, of Rows::put, is what lane k < n says, by which element of `from` it begins at.
    template <typename Load>
    __device__ __forceinline__ Merged(const float* from, int offset, int n, Load load) {
        int lane = threadIdx.x % 32;
        float most = lane < n ? load(from + offset + D) : NEG_INF, weights = lane < n ? load(from + offset + D + 1) : 0.f;
        top = warp_max(most);
        float weight = most == NEG_INF ? 0.f : exp2_fast(most - top);
        sum = warp_sum(weights * weight);
#pragma unroll
        for (int c = 0; c < D / 32; c++) value[c] = 0.f;
        for (int k = 0; k < n; k++) {
            float w = __shfl_sync(FULL, weight, k);
            const float* row = from + __shfl_sync(FULL, offset, k) + lane;
#pragma unroll
            for (int c = 0; c < D / 32; c++) value[c] += w * load(row + c * 32);
        }
    }

    __device__ __forceinline__ void put(bf16* to) const {
#pragma unroll
        for (int c = 0; c < D / 32; c++) to[c * 32 + threadIdx.x % 32] = to_bf16(value[c] / sum);
    }
};

// Merges the warps of a block and the splits of a sequence; each warp has left what Rows::put gives in `space`. `token0`: of the
// tile's first row.
template <int D, int WARPS>
static __device__ __forceinline__ void merge(const Attention& p, int tile, int token0, int rows, int splits) {
    constexpr int ROW = D + 2, TILE = 16 * ROW;
    __shared__ bool last;
    __syncthreads();
    int kv_head = blockIdx.y, group = p.q_heads / p.kv_heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    auto target = [&](int r) { return p.out + ((size_t)(token0 + r / group) * p.q_heads + kv_head * group + r % group) * D; };
    size_t cell = (size_t)tile * p.kv_heads + kv_head;
    float* all = p.partial + cell * p.splits * TILE;
    for (int r = warp; r < rows; r += WARPS) {
        Merged<D> x((const float*)space, lane * TILE + r * ROW, WARPS, [](const float* at) { return *at; });
        if (splits == 1) {
            x.put(target(r));
            continue;
        }
        float* mine = all + blockIdx.z * TILE + r * ROW;
#pragma unroll
        for (int c = 0; c < D / 32; c++) mine[c * 32 + lane] = x.value[c];
        if (lane == 0) mine[D] = x.top, mine[D + 1] = x.sum;
    }
    if (splits == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(p.tickets + cell, 1u) == (u32)splits - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int r = warp; r < rows; r += WARPS) {
        Merged<D> x(all, lane * TILE + r * ROW, splits, [](const float* at) { return __ldcg(at); });
        x.put(target(r));
    }
    if (threadIdx.x == 0) p.tickets[cell] = 0;
}

static __device__ __forceinline__ int splits_of(const Attention& p, int blocks, int warps) {
    return min(p.splits, (blocks + warps * BLOCKS_PER_WARP - 1) / (warps * BLOCKS_PER_WARP));
}

// Sequences of any number of tokens. Grid: (tiles, key heads, splits), WARPS warps.
template <int D, int WARPS>
static __device__ __forceinline__ void attend(const Attention& p) {
    auto acc = (float(*)[16][D + 2])space;
    int tile = blockIdx.x, kv_head = blockIdx.y;
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
    int group = p.q_heads / p.kv_heads;
    let_next_start();
    wait_for_previous();
    int seq = p.tile_seq[tile], first = p.tile_first[tile];
    int kv_len = p.kv_len[seq], q_len = p.q_len[seq];
    if (kv_len == 0) return;
    int tile_tokens = min(16 / group, q_len - first);
    int token0 = p.q_start[seq] + first, rows = tile_tokens * group;
    // Keys that the last query of the tile may see.
    int visible = kv_len - q_len + first + tile_tokens;
    int blocks = (visible + BLOCK - 1) / BLOCK, splits = splits_of(p, blocks, WARPS);
    if (blockIdx.z >= splits) return;
    Rows<D> x;
    Queries<D> queries(rows, [&](int r) { return p.q + ((size_t)(token0 + r / group) * p.q_heads + kv_head * group + r % group) * D; });
#pragma unroll
    for (int h = 0; h < 2; h++) x.limit[h] = kv_len - q_len + first + (g + 8 * h) / group;
    const int* table = p.tables + (size_t)seq * p.table_width;
    for (int b = blockIdx.z * WARPS + warp; b < blocks; b += WARPS * splits) {
        size_t base = ((size_t)table[b] * p.kv_heads + kv_head) * BLOCK * D;
        KeyBlock<D> block;
        block.load_keys(p.keys + base);
        block.load_values(p.values + base);
        float s[4][4], shrink[2];
        x.score(queries, block, b * BLOCK, p.scale, s, shrink);
        x.add(block, s, shrink);
    }
    x.put(acc[warp]);
    merge<D, WARPS>(p, tile, token0, rows, splits);
}

// Sequences of one token each, sequence i with token i, straight from the projection: a warp per head puts queries, key and
// value into shared memory, from where the key and value also take their places in the block of keys that has been loaded
// before they were there. Whatever steps before this one have written may be read before the wait, because `embed` lets
// nobody start before it has waited itself; so the first blocks of keys arrive while the projection is computed.
// Grid: (sequences, key heads, splits).
template <int D, int WARPS>
static __device__ __forceinline__ void decode(const Attention& p, const Projection& from) {
    auto acc = (float(*)[16][D + 2])space;
    __shared__ __align__(16) bf16 own[18 * D];
    int seq = blockIdx.x, kv_head = blockIdx.y, warp = threadIdx.x / 32;
    int group = p.q_heads / p.kv_heads;
    let_next_start();
    int kv_len = p.kv_len[seq], position = kv_len - 1;
    const int* table = p.tables + (size_t)seq * p.table_width;
    int blocks = (kv_len + BLOCK - 1) / BLOCK, splits = splits_of(p, blocks, WARPS);
    if (blockIdx.z >= splits) return;
    int b = blockIdx.z * WARPS + warp;
    KeyBlock<D> block;
    size_t base = 0;
    auto place = [&](int b) { return ((size_t)table[b] * p.kv_heads + kv_head) * BLOCK * D; };
    if (b < blocks) {
        base = place(b);
        block.load_keys(p.keys + base);
        block.load_values(p.values + base);
    }
    int own_block = table[position / BLOCK];
    wait_for_previous();
    // Two heads at a time, so that the loads of both are under way together.
    for (int i = warp; i < group + 2; i += 2 * WARPS) {
        Head h[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int item = i + j * WARPS;
            int index = item < group ? kv_head * group + item : p.q_heads + (item - group) * p.kv_heads + kv_head;
            if (item < group + 2) h[j] = from.head(seq, position, index);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int item = i + j * WARPS;
            if (item >= group + 2) break;
            put_head(h[j], own + (item < group ? item : 16 + item - group) * D, D, 1);
            if (item >= group && blockIdx.z == 0)
                from.store(h[j], p.q_heads + (item - group) * p.kv_heads + kv_head, own_block, position % BLOCK);
        }
    }
    __syncthreads();
    Rows<D> x;
    Queries<D> queries(group, [&](int r) { return own + r * D; });
    x.limit[0] = x.limit[1] = position;
    for (bool ready = true; b < blocks; ready = false, b += WARPS * splits) {
        if (!ready) {
            base = place(b);
            block.load_keys(p.keys + base);
            block.load_values(p.values + base);
        }
        if (b == blocks - 1) block.patch_key(position % BLOCK, own + 16 * D);
        float s[4][4], shrink[2];
        x.score(queries, block, b * BLOCK, p.scale, s, shrink);
        if (b == blocks - 1) block.patch_value(position % BLOCK, own + 17 * D);
        x.add(block, s, shrink);
    }
    x.put(acc[warp]);
    merge<D, WARPS>(p, seq, seq, group, splits);
}

// Few sequences need many warps each, so that all of their keys are under way at once; many need little of everything, so
// that many of them are. Measured on an H200, 14 and 12 query heads over 2, 160 to 1200 keys.
#define ATTENTION(D, WARPS, FEW, MANY, BLOCKS)                                                                    \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) attention_##D(const __grid_constant__ Attention p) {   \
        attend<D, WARPS>(p);                                                                                        \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(32 * FEW)                                                          \
        decode_few_##D(const __grid_constant__ Attention p, const __grid_constant__ Projection from) {              \
        decode<D, FEW>(p, from);                                                                                    \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(32 * MANY, BLOCKS)                                                 \
        decode_many_##D(const __grid_constant__ Attention p, const __grid_constant__ Projection from) {             \
        decode<D, MANY>(p, from);                                                                                   \
    }
ATTENTION(32, 8, 8, 3, 5)
ATTENTION(64, 8, 8, 3, 4)
ATTENTION(96, 4, 8, 2, 4)
ATTENTION(128, 4, 8, 2, 4)
