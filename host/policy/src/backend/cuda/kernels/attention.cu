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

// Grid: (tiles, key heads, splits), WARPS warps. DECODE: every sequence has one token, which is taken from the projection
// here: a warp per head, then the queries wait in shared memory, and the new key and value are in the cache before the
// block reads it. Each split of a sequence writes them, all the same.
template <int D, int WARPS, bool DECODE>
static __device__ __forceinline__ void attend(const Attention& p, const Projection& from) {
    constexpr int CHUNKS = D / 32, TILES = D / 8;
    __shared__ float acc[WARPS][16][D + 2];
    __shared__ bool last;
    int tile = blockIdx.x, kv_head = blockIdx.y, split = blockIdx.z;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
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
    int blocks = (visible + BLOCK - 1) / BLOCK;
    int splits = min(p.splits, (blocks + WARPS * BLOCKS_PER_WARP - 1) / (WARPS * BLOCKS_PER_WARP));
    if (split >= splits) return;
    const bf16* queries = p.q + ((size_t)token0 * p.q_heads + kv_head * group) * D;
    if (DECODE) {
        __shared__ __align__(16) bf16 own[16 * D];
        int position = kv_len - 1;
        int block = p.tables[(size_t)seq * p.table_width + position / BLOCK];
        // Two heads at a time, so that the loads of both are under way together.
        for (int i = warp; i < group + 2; i += 2 * WARPS) {
            Head h[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int item = i + j * WARPS;
                int index = item < group ? kv_head * group + item : p.q_heads + (item - group) * p.kv_heads + kv_head;
                if (item < group + 2) h[j] = from.head(token0, position, index);
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int item = i + j * WARPS;
                if (item < group)
                    put_head(h[j], own + item * D, D, 1);
                else if (item < group + 2)
                    from.store(h[j], p.q_heads + (item - group) * p.kv_heads + kv_head, block, position % BLOCK);
            }
        }
        queries = own;
        __syncthreads();
    }
    int limit[2];
    u32 qa[CHUNKS][8];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int row = g + 8 * h;
        limit[h] = kv_len - q_len + first + row / group;
        const bf16* query = queries + ((size_t)(row / group) * p.q_heads + row % group) * D;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            uint4 x = row < rows ? *(const uint4*)(query + c * 32 + 8 * t) : make_uint4(0, 0, 0, 0);
            qa[c][h] = x.x, qa[c][2 + h] = x.y, qa[c][4 + h] = x.z, qa[c][6 + h] = x.w;
        }
    }
    float o[TILES][4], m[2] = {NEG_INF, NEG_INF}, l[2] = {0.f, 0.f};
#pragma unroll
    for (int d = 0; d < TILES; d++)
#pragma unroll
        for (int i = 0; i < 4; i++) o[d][i] = 0.f;
    const int* table = p.tables + (size_t)seq * p.table_width;
    size_t block_size = (size_t)p.kv_heads * BLOCK * D;
    for (int b = split * WARPS + warp; b < blocks; b += WARPS * splits) {
        size_t base = table[b] * block_size + (size_t)kv_head * BLOCK * D;
        const bf16* k = p.keys + base;
        const bf16* v = p.values + base;
        uint4 kk[4][CHUNKS], vv[TILES];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const bf16* key = k + (8 * (g >> 1) + 2 * j + (g & 1)) * D + 8 * t;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) kk[j][c] = load16(key + c * 32);
        }
#pragma unroll
        for (int d = 0; d < TILES; d++) vv[d] = load16(v + (8 * d + g) * BLOCK + 8 * t);
        float s[4][4];
        float top[2] = {NEG_INF, NEG_INF};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.f;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                mma(s[j], qa[c][0], qa[c][1], qa[c][2], qa[c][3], kk[j][c].x, kk[j][c].y);
                mma(s[j], qa[c][4], qa[c][5], qa[c][6], qa[c][7], kk[j][c].z, kk[j][c].w);
            }
            int key = b * BLOCK + 8 * t + 2 * j;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[j][i] = key + (i & 1) <= limit[i >> 1] ? s[j][i] * p.scale : NEG_INF;
                top[i >> 1] = fmaxf(top[i >> 1], s[j][i]);
            }
        }
        float shrink[2];
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
        u32 pa[8];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            pa[2 * j] = pack(s[j][0], s[j][1]);
            pa[2 * j + 1] = pack(s[j][2], s[j][3]);
        }
#pragma unroll
        for (int d = 0; d < TILES; d++) {
            o[d][0] *= shrink[0], o[d][1] *= shrink[0], o[d][2] *= shrink[1], o[d][3] *= shrink[1];
            mma(o[d], pa[0], pa[1], pa[2], pa[3], vv[d].x, vv[d].y);
            mma(o[d], pa[4], pa[5], pa[6], pa[7], vv[d].z, vv[d].w);
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        l[h] += __shfl_xor_sync(FULL, l[h], 1);
        l[h] += __shfl_xor_sync(FULL, l[h], 2);
        float* row = acc[warp][g + 8 * h];
#pragma unroll
        for (int d = 0; d < TILES; d++) {
            row[8 * d + 2 * t] = o[d][2 * h];
            row[8 * d + 2 * t + 1] = o[d][2 * h + 1];
        }
        if (t == 0) row[D] = m[h], row[D + 1] = l[h];
    }
    __syncthreads();
    size_t cell = (size_t)tile * p.kv_heads + kv_head;
    float* mine = p.partial + (cell * p.splits + split) * 16 * (D + 2);
    for (int i = threadIdx.x; i < rows * D; i += 32 * WARPS) {
        int r = i / D, d = i % D;
        float top = NEG_INF, sum = 0.f, value = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, acc[w][r][D]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float weight = top == NEG_INF ? 0.f : exp2_fast(acc[w][r][D] - top);
            sum += acc[w][r][D + 1] * weight;
            value += acc[w][r][d] * weight;
        }
        if (splits == 1) {
            p.out[((size_t)(token0 + r / group) * p.q_heads + kv_head * group + r % group) * D + d] = to_bf16(value / sum);
        } else {
            mine[r * (D + 2) + d] = value;
            if (d == 0) mine[r * (D + 2) + D] = top, mine[r * (D + 2) + D + 1] = sum;
        }
    }
    if (splits == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(p.tickets + cell, 1u) == (u32)splits - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    const float* all = p.partial + cell * p.splits * 16 * (D + 2);
    for (int i = threadIdx.x; i < rows * D; i += 32 * WARPS) {
        int r = i / D, d = i % D;
        float top = NEG_INF, sum = 0.f, value = 0.f;
        for (int s = 0; s < splits; s++) top = fmaxf(top, __ldcg(all + (s * 16 + r) * (D + 2) + D));
        for (int s = 0; s < splits; s++) {
            const float* row = all + (s * 16 + r) * (D + 2);
            float weight = exp2_fast(__ldcg(row + D) - top);
            sum += __ldcg(row + D + 1) * weight;
            value += __ldcg(row + d) * weight;
        }
        p.out[((size_t)(token0 + r / group) * p.q_heads + kv_head * group + r % group) * D + d] = to_bf16(value / sum);
    }
    if (threadIdx.x == 0) p.tickets[cell] = 0;
}

#define ATTENTION(D, WARPS)                                                                                       \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                        \
        attention_##D(const __grid_constant__ Attention p, const __grid_constant__ Projection from) {               \
        attend<D, WARPS, false>(p, from);                                                                           \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                        \
        decode_##D(const __grid_constant__ Attention p, const __grid_constant__ Projection from) {                  \
        attend<D, WARPS, true>(p, from);                                                                            \
    }
ATTENTION(32, 8)
ATTENTION(64, 8)
ATTENTION(96, 4)
ATTENTION(128, 4)
