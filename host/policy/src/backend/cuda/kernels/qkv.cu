// From the fused projection to rotated queries and cached keys and values, in one pass.

// One head of one token on its way from the projection: bias, Qwen3's norm of the head, rotation (Su et al. 2021). Lane l
// of a warp has the pairs (i, i + D/2) of i = l, l + 32, …; D is at most 256.
struct Head {
    float first[4], second[4];
};

// from: [D]; bias, norm: [D] or null; rope: [D], cosines of D/2 frequencies and then their sines, or null for values.
static __device__ __forceinline__ Head take_head(const bf16* from, const float* bias, const float* norm, const float* rope,
                                                 int dim, float eps) {
    int lane = threadIdx.x % 32, half = dim / 2;
    Head h;
    float squares = 0.f;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        int i = lane + 32 * k;
        if (i < half) {
            h.first[k] = to_f32(from[i]) + (bias ? bias[i] : 0.f);
            h.second[k] = to_f32(from[i + half]) + (bias ? bias[i + half] : 0.f);
            squares += h.first[k] * h.first[k] + h.second[k] * h.second[k];
        }
    }
    float scale = norm ? rsqrtf(warp_sum(squares) / dim + eps) : 1.f;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        int i = lane + 32 * k;
        if (i < half && rope) {
            float x = h.first[k], y = h.second[k];
            if (norm) x *= scale * norm[i], y *= scale * norm[i + half];
            float cosine = rope[i], sine = rope[half + i];
            h.first[k] = x * cosine - y * sine;
            h.second[k] = y * cosine + x * sine;
        }
    }
    return h;
}

// Element i of the head to `to[i · stride]`.
static __device__ __forceinline__ void put_head(const Head& h, bf16* to, int dim, int stride) {
    int lane = threadIdx.x % 32, half = dim / 2;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        int i = lane + 32 * k;
        if (i < half) to[(size_t)i * stride] = to_bf16(h.first[k]), to[(size_t)(i + half) * stride] = to_bf16(h.second[k]);
    }
}

// What a layer does to the fused projection. qkv: [T, (Q + 2K)·D] with heads of q, k, v in this order; bias: [(Q + 2K)·D]
// or null; q_norm, k_norm: [D] or null; rope: [positions, D]. Keys go to [blocks, K, BLOCK, D]; values to
// [blocks, K, D, BLOCK], transposed, so that attention reads both 16 bytes at a time.
struct Projection {
    const bf16* qkv;
    const float *bias, *q_norm, *k_norm, *rope;
    bf16 *keys, *values;
    int q_heads, kv_heads, dim;
    float eps;

    __device__ __forceinline__ Head head(int token, int position, int index) const {
        bool is_q = index < q_heads, is_v = index >= q_heads + kv_heads;
        const bf16* from = qkv + ((size_t)token * (q_heads + 2 * kv_heads) + index) * dim;
        return take_head(from, bias ? bias + index * dim : bias, is_v ? (const float*)0 : is_q ? q_norm : k_norm,
                         is_v ? (const float*)0 : rope + (size_t)position * dim, dim, eps);
    }

    // Writes a key or value head to its slot in `block`.
    __device__ __forceinline__ void store(const Head& h, int index, int block, int slot) const {
        bool is_v = index >= q_heads + kv_heads;
        int kv = index - q_heads - (is_v ? kv_heads : 0);
        size_t base = ((size_t)block * kv_heads + kv) * BLOCK * dim;
        if (is_v)
            put_head(h, values + base + slot, dim, BLOCK);
        else
            put_head(h, keys + base + (size_t)slot * dim, dim, 1);
    }
};

// All heads of all tokens; q: [T, Q, D]. One warp per token and head, 4 warps a block. A token at position -1 is padding
// and writes nothing.
extern "C" __global__ void __launch_bounds__(128) qkv_rope_cache(const __grid_constant__ Projection p, const int* positions,
                                                                 const int* sequences, const int* tables, int table_width,
                                                                 bf16* q, int tokens) {
    int heads = p.q_heads + 2 * p.kv_heads;
    int item = blockIdx.x * 4 + threadIdx.x / 32;
    int token = item / heads, index = item % heads;
    let_next_start();
    wait_for_previous();
    if (token >= tokens) return;
    int position = positions[token];
    if (position < 0) return;
    Head h = p.head(token, position, index);
    if (index < p.q_heads) {
        put_head(h, q + ((size_t)token * p.q_heads + index) * p.dim, p.dim, 1);
    } else {
        int block = tables[(size_t)sequences[token] * table_width + position / BLOCK];
        p.store(h, index, block, position % BLOCK);
    }
}

// Copies whole blocks of keys and values, all layers: pairs: [n, 2] from and to. Grid: (layers · 2, n).
extern "C" __global__ void copy_blocks(uint4* pool, const int* pairs, size_t layer_words, int block_words) {
    let_next_start();
    wait_for_previous();
    uint4* layer = pool + (size_t)blockIdx.x * layer_words;
    const uint4* from = layer + (size_t)pairs[2 * blockIdx.y] * block_words;
    uint4* to = layer + (size_t)pairs[2 * blockIdx.y + 1] * block_words;
    for (int i = threadIdx.x; i < block_words; i += blockDim.x) to[i] = from[i];
}
