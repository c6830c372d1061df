// Attention for one token each of sequences that share the first blocks of their prompts, as the completions of one prompt do:
// a block of threads takes up to 8 of them, reads what they share once for all, 16 of their query heads to a tensor-core tile,
// and what is each one's own as `decode` of attention.cu does (cf. Hydragen, Juravsky et al. 2024). The parts meet in shared
// memory, so nothing but the result is written.

// Bytes of shared memory: what Rows::put needs twice for each warp, queries of 64 rows, a key and a value of each member.
#define GROUP_WARPS 8
#define GROUP_MEMBERS 8
#define GROUP_ROWS 64

// tile_seq: first sequence of each tile, which has those up to the first of the next; tile_first: blocks they share.
// `members`: most sequences of a tile, 2, 4 or 8, and with their heads at most 64 rows. Grid: (tiles, key heads).
template <int D>
static __device__ __forceinline__ void decode_group(const Attention& p, const Projection& from, int members) {
    // Registers for two blocks of keys, so that one is on its way while the other is used.
    constexpr bool AHEAD = D <= 64;
    auto own_acc = (float(*)[16][D + 2])space;
    auto shared_acc = own_acc + GROUP_WARPS;
    bf16* queries = (bf16*)(shared_acc + GROUP_WARPS);
    bf16* fresh = queries + GROUP_ROWS * D;
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
    // Of a member's own blocks this warp takes every `each`-th.
    int each = GROUP_WARPS / members, member = warp / each;
    const int* table = p.tables + (size_t)(seq0 + min(member, count - 1)) * p.table_width;
    int kv_len = member < count ? p.kv_len[seq0 + member] : 0, position = kv_len - 1;
    int blocks = (kv_len + BLOCK - 1) / BLOCK, b = common + warp % each;
    KeyBlock<D> block, other;
    if (b < blocks) {
        block.load_keys(p.keys + place(table, b));
        block.load_values(p.values + place(table, b));
    }
    // Of the shared blocks it takes every `strides`-th, for one tile of 16 rows.
    int rows = count * group, tiles = 1;
    while (tiles * 16 < members * group) tiles *= 2;
    int rows0 = warp % tiles * 16, strides = GROUP_WARPS / tiles, s = rows0 < rows ? warp / tiles : common;
    const int* prompt = p.tables + (size_t)seq0 * p.table_width;
    if (AHEAD && s < common) {
        other.load_keys(p.keys + place(prompt, s));
        other.load_values(p.values + place(prompt, s));
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
    {
        Rows<D> x;
        x.begin(rows - rows0, [&](int r) { return queries + (rows0 + r) * D; });
        x.limit[0] = x.limit[1] = 0x7fffffff;
        for (bool ready = AHEAD; s < common; ready = false, s += strides) {
            if (!ready) {
                other.load_keys(p.keys + place(prompt, s));
                other.load_values(p.values + place(prompt, s));
            }
            x.score(other, s * BLOCK, p.scale, keep, shrink);
            x.add(other, keep, shrink);
        }
        x.put(shared_acc[warp]);
    }
    Rows<D> x;
    x.begin(group, [&](int r) { return queries + (min(member, count - 1) * group + r) * D; });
    x.limit[0] = x.limit[1] = position;
    auto use = [&](KeyBlock<D>& now, KeyBlock<D>& next) {
        if (AHEAD && b + each < blocks) {
            next.load_keys(p.keys + place(table, b + each));
            next.load_values(p.values + place(table, b + each));
        }
        if (b == blocks - 1) now.patch_key(position % BLOCK, fresh + 2 * member * D);
        x.score(now, b * BLOCK, p.scale, keep, shrink);
        if (b == blocks - 1) now.patch_value(position % BLOCK, fresh + (2 * member + 1) * D);
        x.add(now, keep, shrink);
        b += each;
        if (!AHEAD && b < blocks) {
            now.load_keys(p.keys + place(table, b));
            now.load_values(p.values + place(table, b));
        }
    };
    while (b < blocks) {
        use(block, other);
        if (AHEAD && b < blocks) use(other, block);
    }
    x.put(own_acc[warp]);
    __syncthreads();
    for (int r = warp; r < rows; r += GROUP_WARPS) {
        int m = r / group, h = r % group, lane = threadIdx.x % 32;
        if (lengths[m] == 0) continue;
        // The parts are those of the member's own blocks and then of the shared ones.
        int part = lane < each ? m * each + lane : GROUP_WARPS + (lane - each) * tiles + r / 16;
        int offset = (part * 16 + (lane < each ? h : r % 16)) * (D + 2);
        Merged<D> merged((const float*)space, offset, each + strides, [](const float* at) { return *at; });
        merged.put(p.out + ((size_t)(seq0 + m) * p.q_heads + kv_head * group + h) * D);
    }
}

#define DECODE_GROUP(D)                                                                                               \
    extern "C" __global__ void __launch_bounds__(32 * GROUP_WARPS, 1)                                                 \
        decode_group_##D(const __grid_constant__ Attention p, const __grid_constant__ Projection from, int members) { \
        decode_group<D>(p, from, members);                                                                            \
    }
DECODE_GROUP(32)
DECODE_GROUP(64)
DECODE_GROUP(96)
DECODE_GROUP(128)
