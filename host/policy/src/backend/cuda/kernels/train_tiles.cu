// Tiles in shared memory, and products of them.

#if __CUDA_ARCH_FEAT_SM90_ALL
#define WARPGROUPS 1
#else
#define WARPGROUPS 0
#endif

// Whether heads of D are multiplied by whole warpgroups (wgmma), which Hopper needs for full speed. Then a warp has 16 rows
// of a tile, and the four of a warpgroup go on together.
template <int D>
static constexpr bool GROUPED = WARPGROUPS && D % 64 == 0;

// Where 8 neighbours of a row of a tile of ROWS in shared memory are: chunks change places so that 8 rows of a column, which
// ldmatrix reads, lie in different banks. For whole 64 columns this is wgmma's layout: panels of rows of 128 bytes, swizzled.
template <int D, int ROWS>
static __device__ __forceinline__ int place(int row, int chunk) {
    if (D % 64) return row * D + (chunk ^ (row >> 1 & 3)) * 8;
    return chunk / 8 * ROWS * 64 + row * 64 + (chunk % 8 ^ (row & 7)) * 8;
}
static __device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 or 4 bytes on their way to shared memory; zeros where there is nothing to read.
static __device__ __forceinline__ void fetch16(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
static __device__ __forceinline__ void fetch4(void* to, const void* from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address(to)), "l"(from), "r"(there ? 4 : 0) : "memory");
}
// What all threads of the block have fetched so far is there, and all have come this far.
static __device__ __forceinline__ void arrived() {
    asm volatile("cp.async.wait_all;" ::: "memory");
#if WARPGROUPS
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    __syncthreads();
}

// ROWS rows of D numbers to a tile; row r is token(r) of `from`, zeros if that is negative.
template <int D, int ROWS, int THREADS, typename Token>
static __device__ __forceinline__ void fetch_rows(bf16* to, const bf16* from, int stride, Token token) {
    static_assert(ROWS * D / 8 % THREADS == 0, "whole rounds");
#pragma unroll
    for (int j = 0; j < ROWS * D / 8; j += THREADS) {
        int i = threadIdx.x + j, row = i / (D / 8), chunk = i % (D / 8), at = token(row);
        fetch16(to + place<D, ROWS>(row, chunk), from + (size_t)max(at, 0) * stride + chunk * 8, at >= 0);
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

template <int M, int N>
static __device__ __forceinline__ void clear(float (*d)[N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++) d[m][n][0] = d[m][n][1] = d[m][n][2] = d[m][n][3] = 0.f;
}

// What a product has left, as the left operand of the next one: N · 8 columns.
template <int M, int N>
struct Left {
    u32 a[M][N / 2][4];

    __device__ __forceinline__ void pack_from(const float (*d)[N][4]) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int k = 0; k < N / 2; k++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float* pair = d[m][2 * k + i / 2] + i % 2 * 2;
                    a[m][k][i] = pack(pair[0], pair[1]);
                }
    }
    // Until here a product under way may read it.
    __device__ __forceinline__ void keep() {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int k = 0; k < N / 2; k++) asm volatile("" : "+r"(a[m][k][0]), "+r"(a[m][k][1]), "+r"(a[m][k][2]), "+r"(a[m][k][3]));
    }
};

#if WARPGROUPS
// Swizzled rows of 128 bytes, eight to a group of 1024; `panel`: bytes from 64 columns to the next 64, where columns are the
// long side of the product.
static __device__ __forceinline__ u64 descriptor(u32 at, u32 panel) {
    return (u64)((at & 0x3ffff) >> 4) | (u64)(panel >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32(i) D8(i), D8(i + 8), D8(i + 16), D8(i + 24)
#define N32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define N64 N32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define N128 N64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 "
// d (+)= a · bᵀ, a and b of 64 and N rows in shared memory.
template <int N>
static __device__ __forceinline__ void wgmma_rows(float* d, u64 a, u64 b, int add) {
    if constexpr (N == 32)
        asm volatile("{.reg .pred p; setp.ne.b32 p, %18, 0;" WGMMA("32") "{" N32 "}, %16, %17, p, 1, 1, 0, 0;}"
                     : D8(0), D8(8) : "l"(a), "l"(b), "r"(add));
    else if constexpr (N == 64)
        asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;" WGMMA("64") "{" N64 "}, %32, %33, p, 1, 1, 0, 0;}"
                     : D32(0) : "l"(a), "l"(b), "r"(add));
    else
        asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;" WGMMA("128") "{" N128 "}, %64, %65, p, 1, 1, 0, 0;}"
                     : D32(0), D32(32) : "l"(a), "l"(b), "r"(add));
}
// d += a · b, a in registers, b of N columns in shared memory.
template <int N>
static __device__ __forceinline__ void wgmma_columns(float* d, const u32 a[4], u64 b) {
    if constexpr (N == 64)
        asm volatile(WGMMA("64") "{" N64 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                     : D32(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else
        asm volatile(WGMMA("128") "{" N128 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                     : D32(0), D32(32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif

// Products begun are done, but for the last LEFT. What they write, and the registers they read, are not to be touched before.
template <int D, int LEFT = 0>
static __device__ __forceinline__ void finish() {
#if WARPGROUPS
    if constexpr (GROUPED<D>) asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#endif
}

// Begins d[m][n] = a · bᵀ over D: rows of the tile `a` from `a_row`, 16 · M of this warp, and N · 8 rows of `b` from `b_row`.
template <int D, int A_ROWS, int B_ROWS, int M, int N>
static __device__ __forceinline__ void times_rows(float (*d)[N][4], const bf16* a, int a_row, const bf16* b, int b_row) {
#if WARPGROUPS
    if constexpr (GROUPED<D>) {
        static_assert(M == 1, "16 rows of a warp");
        u32 left = address(a) + a_row / 64 * 64 * 128, right = address(b) + b_row * 128;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < D / 16; k++)
            wgmma_rows<8 * N>((float*)d, descriptor(left + k / 4 * A_ROWS * 128 + k % 4 * 32, 16),
                              descriptor(right + k / 4 * B_ROWS * 128 + k % 4 * 32, 16), k);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        return;
    }
#endif
    int lane = threadIdx.x % 32;
    clear<M, N>(d);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        u32 left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) load_matrices(left[m], a + place<D, A_ROWS>(a_row + 16 * m + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 right[4];
            load_matrices(right, b + place<D, B_ROWS>(b_row + 8 * n + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma(d[m][n], left[m][0], left[m][1], left[m][2], left[m][3], right[0], right[1]);
                mma(d[m][n + 1], left[m][0], left[m][1], left[m][2], left[m][3], right[2], right[3]);
            }
        }
    }
}

// Begins d[m][D] += a · b over N · 8 rows of `b` from `row`.
template <int D, int B_ROWS, int M, int N>
static __device__ __forceinline__ void times_columns(float (*d)[D / 8][4], const Left<M, N>& left, const bf16* b, int row) {
#if WARPGROUPS
    if constexpr (GROUPED<D>) {
        u32 right = address(b) + row * 128;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < N / 2; k++) wgmma_columns<D>((float*)d, left.a[0][k], descriptor(right + k * 2048, B_ROWS * 128));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        return;
    }
#endif
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < N / 2; k++)
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            u32 right[4];
            load_transposed(right, b + place<D, B_ROWS>(row + 16 * k + lane % 16, n + lane / 16));
#pragma unroll
            for (int m = 0; m < M; m++) {
                const u32* a = left.a[m][k];
                mma(d[m][n], a[0], a[1], a[2], a[3], right[0], right[1]);
                mma(d[m][n + 1], a[0], a[1], a[2], a[3], right[2], right[3]);
            }
        }
}
