// Attention for one token each of sequences that share the first blocks of their prompts, as the completions of one prompt do:
// a block of threads takes up to 8 of them, reads what they share once for all, 16 of their query heads to a tensor-core tile,
// and what is each one's own as `decode` of attention.cu does (cf. Hydragen, Juravsky et al. 2024). The parts meet in shared
// memory, so nothing but the result is written.

#define GROUP_WARPS 8
#define GROUP_MEMBERS 8

// tile_seq: first sequence of each tile, which has those up to the first of the next; tile_first: blocks they share.
// `members`: most sequences of a tile, 2, 4 or 8; with their heads at most 16 · TILES rows. Grid: (tiles, key heads).
template <int D, int TILES>
static __device__ __forceinline__ void decode_group(const Attention& p, const Projection& from, int members) {
    // What Rows::put needs, for each warp and its member's own keys and for each warp and tile of the shared ones; queries, a
    // key and a value of each member.
    auto own_acc = (float(*)[16][D + 2])space;
    auto shared_acc = own_acc + GROUP_WARPS;
    bf16* queries = (bf16*)(shared_acc + GROUP_WARPS * TILES);
    bf16* fresh = queries + 16 * TILES * D;
    __shared__ int lengths[GROUP_MEMBERS], last_block[GROUP_MEMBERS];
    int tile = blockIdx.x, kv_head = blockIdx.y, warp = threadIdx.x / 32;
    int group = p.q_heads / p.kv_heads;
    let_next_start();
    int seq0 = p.tile_seq[tile], count = min(p.tile_seq[tile + 1] - seq0, members);
    if (count <= 0) return;
    int common = p.tile_first[tile];
    if (threadIdx.x < count) {
        int length = p.kv_len[seq0 + threadIdx.x];
        lengths[threadIdx.x] = length;
        last_block[threadIdx.x] = p.tables[(size_t)(seq0 + threadIdx.x) * p.table_width + max(length - 1, 0) / BLOCK];
    }
    auto place = [&](const int* table, int b) { return ((size_t)table[b] * p.kv_heads + kv_head) * BLOCK * D; };
    // Of the shared blocks a warp takes every `strides`-th; if they are few, for every other tile of rows only.
    int rows = count * group, strides = common > GROUP_WARPS / 2 ? GROUP_WARPS : GROUP_WARPS / 2;
    int s = warp % strides, half = warp / strides, halves = GROUP_WARPS / strides;
    const int* prompt = p.tables + (size_t)seq0 * p.table_width;
    KeyBlock<D> block;
    if (s < common) {
        block.load_keys(p.keys + place(prompt, s));
        block.load_values(p.values + place(prompt, s));
    }
    __syncthreads();
    wait_for_previous();
    // Three heads at a time, so that their loads are under way together.
    int items = count * (group + 2);
    for (int i = warp; i < items; i += 3 * GROUP_WARPS) {
        Head h[3];
#pragma unroll
        for (int j = 0; j < 3; j++) {
            int item = i + j * GROUP_WARPS, m = item / (group + 2), k = item % (group + 2);
            int index = k < group ? kv_head * group + k : p.q_heads + (k - group) * p.kv_heads + kv_head;
            if (item < items && lengths[m] > 0) h[j] = from.head(seq0 + m, lengths[m] - 1, index);
        }
#pragma unroll
        for (int j = 0; j < 3; j++) {
            int item = i + j * GROUP_WARPS, m = item / (group + 2), k = item % (group + 2);
            if (item >= items || lengths[m] == 0) continue;
            put_head(h[j], k < group ? queries + (m * group + k) * D : fresh + (2 * m + k - group) * D, D, 1);
            if (k >= group)
                from.store(h[j], p.q_heads + (k - group) * p.kv_heads + kv_head, last_block[m], (lengths[m] - 1) % BLOCK);
        }
    }
    __syncthreads();
    float keep[4][4], shrink[2];
    int parts = min(strides, common);
    if (s < common) {
        Rows<D> x[TILES];
#pragma unroll
        for (int t = 0; t < TILES; t++) x[t].limit[0] = x[t].limit[1] = 0x7fffffff;
        for (int at = s; at < common; at += strides) {
            if (at != s) {
                block.load_keys(p.keys + place(prompt, at));
                block.load_values(p.values + place(prompt, at));
            }
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                if (t % halves != half || 16 * t >= rows) continue;
                Queries<D> q(rows - 16 * t, [&](int r) { return queries + (16 * t + r) * D; });
                x[t].score(q, block, at * BLOCK, p.scale, keep, shrink);
                x[t].add(block, keep, shrink);
            }
        }
#pragma unroll
        for (int t = 0; t < TILES; t++)
            if (t % halves == half && 16 * t < rows) x[t].put(shared_acc[s * TILES + t]);
    }
    // Of a member's own blocks a warp takes every `each`-th.
    int each = GROUP_WARPS / members, member = warp / each;
    const int* table = p.tables + (size_t)(seq0 + min(member, count - 1)) * p.table_width;
    int kv_len = member < count ? lengths[member] : 0, position = kv_len - 1;
    int blocks = (kv_len + BLOCK - 1) / BLOCK, b = common + warp % each;
    Rows<D> x;
    Queries<D> own(group, [&](int r) { return queries + (min(member, count - 1) * group + r) * D; });
    x.limit[0] = x.limit[1] = position;
    if (b < blocks) {
        block.load_keys(p.keys + place(table, b));
        block.load_values(p.values + place(table, b));
    }
    while (b < blocks) {
        bool newest = b == blocks - 1;
        if (newest) block.patch_key(position % BLOCK, fresh + 2 * member * D);
        x.score(own, block, b * BLOCK, p.scale, keep, shrink);
        if (newest) block.patch_value(position % BLOCK, fresh + (2 * member + 1) * D);
        b += each;
        if (b < blocks) block.load_keys(p.keys + place(table, b));
        x.add(block, keep, shrink);
        if (b < blocks) block.load_values(p.values + place(table, b));
    }
    x.put(own_acc[warp]);
    __syncthreads();
    for (int r = warp; r < rows; r += GROUP_WARPS) {
        int m = r / group, h = r % group, lane = threadIdx.x % 32;
        if (lengths[m] == 0) continue;
        // The parts are those of the member's own blocks and then of the shared ones.
        int part = lane < each ? m * each + lane : GROUP_WARPS + (lane - each) * TILES + r / 16;
        int offset = (part * 16 + (lane < each ? h : r % 16)) * (D + 2);
        Merged<D> merged((const float*)space, offset, each + parts, [](const float* at) { return *at; });
        merged.put(p.out + ((size_t)(seq0 + m) * p.q_heads + kv_head * group + h) * D);
    }
}

#define DECODE_GROUP(D, TILES)                                                                                         \
    extern "C" __global__ void __launch_bounds__(32 * GROUP_WARPS, 1)                                                  \
        decode_group_##D##_##TILES(const __grid_constant__ Attention p, const __grid_constant__ Projection from, int members) { \
        decode_group<D, TILES>(p, from, members);                                                                      \
    }
DECODE_GROUP(32, 1)
DECODE_GROUP(32, 2)
DECODE_GROUP(32, 4)
DECODE_GROUP(64, 1)
DECODE_GROUP(64, 2)
DECODE_GROUP(64, 4)
DECODE_GROUP(96, 1)
DECODE_GROUP(128, 1)
