// From the fused projection to rotated queries and cached keys and values, in one pass.

// One warp per token and head, 4 warps a block. qkv: [T, (Q + 2K)·D] with heads of q, k, v in this order; bias:
// [(Q + 2K)·D] or null; q_norm, k_norm: [D] or null (Qwen3's norm of each head); rope: [positions, D] cosines of
// D/2 frequencies and then their sines. Writes q: [T, Q, D]; keys: [blocks, K, BLOCK, D]; values: [blocks, K, D, BLOCK],
// transposed, so that attention reads both 16 bytes at a time. A token at position -1 is padding and writes nothing.
extern "C" __global__ void __launch_bounds__(128) qkv_rope_cache(
    const bf16* qkv, const float* bias, const float* q_norm, const float* k_norm, const float* rope,
    const int* positions, const int* sequences, const int* tables, int table_width, bf16* q, bf16* keys, bf16* values,
    int tokens, int q_heads, int kv_heads, int dim, float eps) {
    int heads = q_heads + 2 * kv_heads;
    int item = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    int token = item / heads, head = item % heads;
    let_next_start();
    wait_for_previous();
    if (token >= tokens) return;
    int position = positions[token];
    if (position < 0) return;
    int half = dim / 2;
    const bf16* from = qkv + ((size_t)token * heads + head) * dim;
    // Lane l has the pairs (i, i + D/2) of i = l, l + 32, …; D is at most 256.
    float a[4], b[4];
    float squares = 0.f;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        int i = lane + 32 * k;
        if (i < half) {
            a[k] = to_f32(from[i]) + (bias ? bias[head * dim + i] : 0.f);
            b[k] = to_f32(from[i + half]) + (bias ? bias[head * dim + i + half] : 0.f);
            squares += a[k] * a[k] + b[k] * b[k];
        }
    }
    bool is_q = head < q_heads, is_v = head >= q_heads + kv_heads;
    const float* norm = is_q ? q_norm : k_norm;
    float scale = 1.f;
    if (norm && !is_v) scale = rsqrtf(warp_sum(squares) / dim + eps);
    int block = tables[(size_t)sequences[token] * table_width + position / BLOCK], slot = position % BLOCK;
    int kv = is_v ? head - q_heads - kv_heads : head - q_heads;
    size_t base = ((size_t)block * kv_heads + kv) * BLOCK * dim;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        int i = lane + 32 * k;
        if (i >= half) break;
        if (is_v) {
            values[base + (size_t)i * BLOCK + slot] = to_bf16(a[k]);
            values[base + (size_t)(i + half) * BLOCK + slot] = to_bf16(b[k]);
            continue;
        }
        float x = a[k] * scale, y = b[k] * scale;
        if (norm) {
            x *= norm[i];
            y *= norm[i + half];
        }
        float cosine = rope[(size_t)position * dim + i], sine = rope[(size_t)position * dim + half + i];
        bf16 first = to_bf16(x * cosine - y * sine), second = to_bf16(y * cosine + x * sine);
        bf16* to = is_q ? q + ((size_t)token * q_heads + head) * dim : keys + base + (size_t)slot * dim;
        to[i] = first;
        to[i + half] = second;
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
