// Products on Hopper for more tokens than skinny.cu serves: y[t] = W·x[t] with the tensor memory accelerator and warpgroup
// products (wgmma), and what surrounds them in a decoder in their epilogues.
//
// W is the 64-row side of a tile and the tokens are its N columns, so that few tokens waste nothing. One warp fetches, 64
// of k at a time, into a ring of STAGES; a warpgroup multiplies 64 rows. The weights of the first round are on their way
// before the kernel before this one has ended, which is most of what a product of few tokens waits for.
//
// RMSNorm is divided: who writes the residual stream also writes x·(norm's weights) as bf16 and, for each of its row tiles,
// the sum of squares of each token; who reads that scales its results, because the scale of a token is common to its row.

#if __CUDA_ARCH_FEAT_SM90_ALL

#define STORE 0     // y: bf16 [T, n]
#define RESIDUAL 1  // x: f32 [T, n], added to; y: bf16 [T, n]: x · norm; sums_out
#define SWIGLU 2    // y: bf16 [T, n / 2]: silu of the first half of the rows of W times the second half
#define LOGITS 3    // y: f32 [T, n]

// cuTensorMapEncodeTiled's result.
struct __align__(64) TensorMap {
    u64 words[16];
};

struct Product {
    void* y;
    float* x;
    const float* norm;
    const float* sums_in;  // [tiles_in, stride], or null: nothing to scale
    float* sums_out;       // [row tiles, stride]
    int tiles_in, stride;
    int tokens, n, k;
    float eps;
};

static __device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// A matrix tile in shared memory: rows of 128 bytes in the swizzle of that size, eight rows to a group.
static __device__ __forceinline__ u64 descriptor(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

static __device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
static __device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
static __device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra again;\n}" ::"r"(barrier), "r"(parity)
        : "memory");
}

static __device__ __forceinline__ void fetch(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}
// A box of 4 × (8 rows of the first half, 8 of the second): a gate and its up end in the same thread.
static __device__ __forceinline__ void fetch_pairs(u32 to, const TensorMap* map, int column, int eight, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
        "l"(map), "r"(column), "r"(0), "r"(0), "r"(eight), "r"(barrier)
        : "memory");
}

static __device__ __forceinline__ u32 cluster_rank() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
static __device__ __forceinline__ u32 cluster_size() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
    return r;
}
static __device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
static __device__ __forceinline__ float2 peer_load(u32 address, u32 rank) {
    u32 there;
    float2 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(there) : "memory");
    return v;
}
static __device__ __forceinline__ void wgmma(float (&d)[8], u64 a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, 1, 1, 1, 0, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
        : "l"(a), "l"(b));
}

static __device__ __forceinline__ void wgmma(float (&d)[16], u64 a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, 1, 1, 1, 0, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
        : "l"(a), "l"(b));
}

static __device__ __forceinline__ void wgmma(float (&d)[32], u64 a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b));
}

// From the accumulators of a tile, silu(gate) · up to y by way of `space`, [N, OUT] with 16 bytes between rows that keep them out
// of each other's banks. Lane (g, t) has the gate of output g of its warp in d0, d1 and the up in d2, d3, for tokens 2t, 2t + 1.
template <int N, int OUT>
static __device__ __forceinline__ void put_gated(const Product& p, bf16* space, const float* scale, const float (&d)[N / 2],
                                                 int token0, int tile) {
    constexpr int LINE = OUT + 8;
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, width = p.n / 2;
    if (warp < OUT / 8) {
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                int token = 8 * j + 2 * t + c;
                float gate = d[4 * j + c] * scale[token], up = d[4 * j + 2 + c] * scale[token];
                space[token * LINE + warp * 8 + g] = to_bf16(gate / (1.f + __expf(-gate)) * up);
            }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < N * (OUT / 8); i += blockDim.x) {
        int token = i / (OUT / 8), at = i % (OUT / 8) * 8, row = tile * OUT + at;
        if (token0 + token < p.tokens && row < width)
            *(uint4*)((bf16*)p.y + (size_t)(token0 + token) * width + row) = *(const uint4*)(space + token * LINE + at);
    }
}

// From the accumulators of a tile to y by way of `space`, f32 [N, 64 · GROUPS]: each block of a cluster takes a share of the
// tokens and adds up what all of them have, in the same order every time.
template <int N, int GROUPS, int FORM>
static __device__ __forceinline__ void put_sums(const Product& p, float* space, const float* scale, const float (&d)[N / 2],
                                                int token0, int tile) {
    constexpr int ROWS = 64 * GROUPS, LINE = ROWS + 4, WARPS = 4 * GROUPS;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 parts = cluster_size(), part = cluster_rank();
    if (warp < WARPS) {
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) space[(8 * j + 2 * t + (c & 1)) * LINE + warp * 16 + g + 8 * (c >> 1)] = d[4 * j + c];
    }
    if (parts > 1)
        cluster_sync();
    else
        __syncthreads();
    int share = N / parts;
    for (int i = warp; i < share; i += WARPS + 2) {
        int local = part * share + i, token = token0 + local;
        if (token >= p.tokens) break;
        if (FORM == LOGITS) {
            // Rows of y need not begin at a multiple of 8 bytes.
            for (int column = lane; column < ROWS && tile * ROWS + column < p.n; column += 32)
                __stcs((float*)p.y + (size_t)token * p.n + tile * ROWS + column, space[local * LINE + column] * scale[local]);
            continue;
        }
        float squares = 0.f;
#pragma unroll
        for (int half = 0; half < GROUPS; half++) {
            int column = half * 64 + 2 * lane, row = tile * ROWS + column;
            float2 v[8], sum = make_float2(0.f, 0.f), old = sum, weight = sum;
            size_t at = (size_t)token * p.n + row;
            if (FORM == RESIDUAL && row < p.n) old = *(const float2*)(p.x + at), weight = *(const float2*)(p.norm + row);
#pragma unroll
            for (int c = 0; c < 8; c++)
                if (c < parts) v[c] = peer_load(shared_address(space + local * LINE + column), c);
#pragma unroll
            for (int c = 0; c < 8; c++)
                if (c < parts) sum.x += v[c].x, sum.y += v[c].y;
            if (row >= p.n) continue;
            if (FORM == RESIDUAL) {
                sum.x += old.x, sum.y += old.y;
                *(float2*)(p.x + at) = sum;
                squares += sum.x * sum.x + sum.y * sum.y;
                sum.x *= weight.x, sum.y *= weight.y;
            } else {
                sum.x *= scale[local], sum.y *= scale[local];
            }
            *(u32*)((bf16*)p.y + at) = pack(sum.x, sum.y);
        }
        if (FORM == RESIDUAL) {
            squares = warp_sum(squares);
            if (lane == 0) p.sums_out[(size_t)tile * p.stride + token] = squares;
        }
    }
    // Nobody may leave while another reads what it has.
    if (parts > 1) cluster_sync();
}

// One warp: scale: [N], of the tokens from token0 on. The loads of 16 tiles are under way together, because the product waits.
template <int N>
static __device__ __forceinline__ void find_scales(const Product& p, float* scale, int token0) {
    constexpr int EACH = (N + 31) / 32, BATCH = 16;
    float sum[EACH], v[EACH][BATCH];
#pragma unroll
    for (int e = 0; e < EACH; e++) sum[e] = 0.f;
    for (int first = 0; first < p.tiles_in; first += BATCH) {
#pragma unroll
        for (int e = 0; e < EACH; e++)
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                int token = token0 + e * 32 + threadIdx.x % 32;
                bool inside = token < p.tokens && first + j < p.tiles_in;
                v[e][j] = inside ? p.sums_in[(size_t)(first + j) * p.stride + token] : 0.f;
            }
#pragma unroll
        for (int e = 0; e < EACH; e++)
#pragma unroll
            for (int j = 0; j < BATCH; j++) sum[e] += v[e][j];
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        int i = e * 32 + threadIdx.x % 32;
        if (i < N) scale[i] = p.sums_in ? rsqrtf(sum[e] / p.k + p.eps) : 1.f;
    }
}

// Grid: (parts · ⌈T / N⌉, ⌈n / (64 · GROUPS)⌉) in clusters of `parts` blocks, a power of two up to 8, which divide k. GROUPS · 4
// warps multiply, one fetches and one finds the scales.
template <int N, int GROUPS, int STAGES, int FORM>
static __device__ __forceinline__ void product(const TensorMap* w, const TensorMap* x, const Product& p) {
    constexpr int W_BYTES = GROUPS * 64 * 128, X_BYTES = N * 128, STAGE = W_BYTES + X_BYTES;
    constexpr int ROWS = 64 * GROUPS, WARPS = 4 * GROUPS;
    extern __shared__ unsigned char space[];
    __shared__ __align__(8) u64 full[STAGES], empty[STAGES];
    __shared__ float scale[N];
    unsigned char* ring = space + (1024 - shared_address(space) % 1024) % 1024;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 parts = cluster_size(), part = cluster_rank();
    int token0 = blockIdx.x / parts * N, tile = blockIdx.y;
    int steps = (p.k + 63) / 64, from = steps * part / parts, count = steps * (part + 1) / parts - from;
    let_next_start();
    auto fetch_w = [&](int i) {
        int s = i % STAGES, column = (from + i) * 64;
        u32 barrier = shared_address(full + s), to = shared_address(ring + s * STAGE);
        barrier_expect(barrier, STAGE);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            if (FORM == SWIGLU)
                fetch_pairs(to + g * 8192, w, column, (tile * GROUPS + g) * 4, barrier);
            else
                fetch(to + g * 8192, w, column, (tile * GROUPS + g) * 64, barrier);
        }
    };
    auto fetch_x = [&](int i) {
        int s = i % STAGES;
        fetch(shared_address(ring + s * STAGE + W_BYTES), x, (from + i) * 64, token0, shared_address(full + s));
    };
    bool fetches = warp == WARPS && lane == 0;
    if (fetches) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(shared_address(full + s), 1);
            barrier_init(shared_address(empty + s), GROUPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for (int i = 0; i < STAGES && i < count; i++) fetch_w(i);
    }
    __syncthreads();
    wait_for_previous();
    float d[N / 2];
    if (fetches) {
        for (int i = 0; i < STAGES && i < count; i++) fetch_x(i);
        for (int i = STAGES; i < count; i++) {
            barrier_wait(shared_address(empty + i % STAGES), (i / STAGES - 1) & 1);
            fetch_w(i);
            fetch_x(i);
        }
    } else if (warp > WARPS) {
        find_scales<N>(p, scale, token0);
    } else if (warp < WARPS) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) d[i] = 0.f;
        for (int i = 0; i < count; i++) {
            int s = i % STAGES;
            barrier_wait(shared_address(full + s), (i / STAGES) & 1);
            u64 a = descriptor(shared_address(ring + s * STAGE + warp / 4 * 8192));
            u64 b = descriptor(shared_address(ring + s * STAGE + W_BYTES));
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int j = 0; j < 4; j++) wgmma(d, a + 2 * j, b + 2 * j);
            asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (i > 0 && threadIdx.x % 128 == 0) barrier_arrive(shared_address(empty + (i - 1) % STAGES));
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
        for (int i = 0; i < N / 2; i++) asm volatile("" : "+f"(d[i])::"memory");
    }
    __syncwarp();
    // Everything fetched has been read: the ring is free.
    __syncthreads();
    if (FORM == SWIGLU)
        put_gated<N, ROWS / 2>(p, (bf16*)ring, scale, d, token0, tile);
    else
        put_sums<N, GROUPS, FORM>(p, (float*)ring, scale, d, token0, tile);
}

#define PRODUCT(NAME, FORM, N, GROUPS, STAGES)                                                                      \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + 64)                                                 \
        NAME##_##N##_##GROUPS##_##STAGES(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x,  \
                                         const __grid_constant__ Product p) {                                       \
        product<N, GROUPS, STAGES, FORM>(&w, &x, p);                                                                \
    }

// The ones that `Tile::of` in product.rs chooses from.
PRODUCT(store, STORE, 16, 1, 8)
PRODUCT(store, STORE, 32, 1, 5)
PRODUCT(store, STORE, 64, 1, 4)
PRODUCT(residual, RESIDUAL, 16, 1, 8)
PRODUCT(residual, RESIDUAL, 32, 1, 5)
PRODUCT(residual, RESIDUAL, 64, 1, 4)
PRODUCT(residual, RESIDUAL, 64, 1, 6)
PRODUCT(swiglu, SWIGLU, 16, 1, 8)
PRODUCT(swiglu, SWIGLU, 16, 2, 4)
PRODUCT(swiglu, SWIGLU, 32, 1, 5)
PRODUCT(swiglu, SWIGLU, 64, 1, 4)
PRODUCT(swiglu, SWIGLU, 64, 1, 6)
PRODUCT(logits, LOGITS, 16, 2, 4)
PRODUCT(logits, LOGITS, 32, 1, 5)
PRODUCT(logits, LOGITS, 64, 1, 4)

#endif
