// Weights in blocks of 32 that share a scale (blocks.rs): a weight is d·q + m in f32, rounded to bf16 as one that was never
// quantised. Of a matrix [N, K] the numbers q are [N, K/32] blocks of 16 bytes (weight i in bits 4i and up of the block) or
// 32 bytes (q + 128 in byte i), and the scales are [N, K/32], d in the low half, m in the high one, both f16. BITS is 4 or 8.

// m is less what `weight` adds to q, in the finer and the coarser of two ways; both are exact where m is 0 or at least 4·d,
// as in blocks that have weights of either sign; else off by d / 512 at most.
struct Scale {
    float d, m, coarse;
};

static __device__ __forceinline__ float half_to_f32(u32 x) {
    float r;
    asm("{.reg .f16 h; mov.b16 h, %1; cvt.f32.f16 %0, h;}" : "=f"(r) : "h"((unsigned short)x));
    return r;
}
template <int BITS>
static __device__ __forceinline__ Scale scale_of(u32 x) {
    float d = half_to_f32(x), m = half_to_f32(x >> 16);
    if (BITS == 8) return {d, fmaf(-32896.f, d, m), 0.f};
    return {d, fmaf(-128.f, d, m), fmaf(-2048.f, d, m)};
}

// (x & mask) | bits in one instruction, which the compiler makes two of.
static __device__ __forceinline__ float placed(u32 x, u32 mask, u32 bits) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(x), "r"(mask), "r"(bits));
    return __uint_as_float(r);
}

// Weight I of the 8 in `low` (BITS 4), or in `low` and then `high` (BITS 8). A small integer in the right bits of a large
// float is that float plus the integer (2^7 or 2^11; 2^15, and 128 of the format), which is faster than a conversion. Two
// places for four bits halve the shifts.
template <int BITS, int I>
static __device__ __forceinline__ float weight(u32 low, u32 high, Scale s) {
    if (BITS == 8) {
        u32 q = __byte_perm(I < 4 ? low : high, 0x47000000u, 0x7504 + 16 * (I % 4));
        return fmaf(s.d, __uint_as_float(q), s.m);
    }
    u32 moved = I < 2 ? low << 12 : I == 2 ? low << 4 : I < 5 ? low : I < 7 ? low >> 8 : low >> 12;
    if (I == 0 || I == 2 || I == 3 || I == 5)
        return fmaf(s.d, placed(moved, 0x0000f000u, 0x45000000u), s.coarse);
    return fmaf(s.d, placed(moved, 0x000f0000u, 0x43000000u), s.m);
}

// 8 weights as bf16.
template <int BITS>
static __device__ __forceinline__ uint4 unpacked(u32 low, u32 high, Scale s) {
    return make_uint4(pack(weight<BITS, 0>(low, high, s), weight<BITS, 1>(low, high, s)),
                      pack(weight<BITS, 2>(low, high, s), weight<BITS, 3>(low, high, s)),
                      pack(weight<BITS, 4>(low, high, s), weight<BITS, 5>(low, high, s)),
                      pack(weight<BITS, 6>(low, high, s), weight<BITS, 7>(low, high, s)));
}

// Words of a block.
#define WORDS BITS

template <int BITS>
static __device__ __forceinline__ uint4 eighth(const u32* quants, const u32* scales, size_t i) {
    u32 low = quants[i * (BITS / 4)], high = BITS == 8 ? quants[i * (BITS / 4) + 1] : 0;
    return unpacked<BITS>(low, high, scale_of<BITS>(scales[i / 4]));
}

// A matrix as bf16, for products that know nothing else. A thread has 8 weights, of `eighths` in all. Such products read
// weights before the kernel before them has ended: the one after this is launched without that freedom.
template <int BITS>
static __device__ __forceinline__ void unpack_all(const u32* quants, const u32* scales, uint4* out, int eighths) {
    int i = blockIdx.x * 256 + threadIdx.x;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (i < eighths) v = eighth<BITS>(quants, scales, i);
    wait_for_previous();
    if (i < eighths) out[i] = v;
}

// Rows ids[t] of a table, [T, K], as bf16. Grid: T. It begins a step (see `embed`).
template <int BITS>
static __device__ __forceinline__ void unpack_rows(const int* ids, const u32* quants, const u32* scales, uint4* out, int k) {
    wait_for_previous();
    let_next_start();
    size_t row = (size_t)ids[blockIdx.x] * (k / 8);
    for (int i = threadIdx.x; i < k / 8; i += blockDim.x)
        out[(size_t)blockIdx.x * (k / 8) + i] = eighth<BITS>(quants, scales, row + i);
}

// `skinny` (skinny.cu) on such a matrix, with its forms. Lane (g, t) takes whole blocks, of four neighbours the t-th: both
// sides then sum over k in that order. It begins with another quarter of the block if t is 2 or 3, which keeps the lanes out of
// each other's banks. DEPTH: quadruples of blocks that a warp has under way.
template <int BITS, int WARPS, int DEPTH, bool NORM, bool SPLIT, int FORM>
static __device__ __forceinline__ void skinny_quantized(const u32* quants, const u32* scales, const void* x,
                                                        const float* norm, void* y, int tokens, int n, int k, float eps) {
    extern __shared__ uint4 space[];
    __shared__ float squares[WARPS][8];
    bf16* xs = (bf16*)space;
    int stride = k + 8, blocks = k / 32;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int tile = SPLIT ? blockIdx.x : blockIdx.x * WARPS + warp;
    int outputs = FORM == SWIGLU ? 8 : 16, all = FORM == SWIGLU ? n / 2 : n;
    bool idle = !SPLIT && tile * outputs >= all;
    int row0 = tile * outputs + g, row1 = FORM == SWIGLU ? n / 2 + row0 : row0 + 8;
    const u32 *s0 = scales + (size_t)row0 * blocks, *s1 = scales + (size_t)row1 * blocks;
    const u32 *w0 = quants + (size_t)row0 * blocks * WORDS, *w1 = quants + (size_t)row1 * blocks * WORDS;
    const bf16* xg = NORM ? xs + g * stride : (const bf16*)x + (size_t)g * k;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    int start = SPLIT ? 4 * warp : 0, step = SPLIT ? 4 * WARPS : 4;
    // The two halves of a block, the second first where t is 2 or 3.
    constexpr int LOADS = BITS / 4;
    uint4 a[DEPTH][LOADS], b[DEPTH][LOADS];
    u32 sa[DEPTH], sb[DEPTH];
    auto load = [&](int i) {
#pragma unroll
        for (int j = 0; j < DEPTH; j++) {
            int at = i + j * step + t;
            bool inside = at < blocks && !idle;
            // A block of zeros is one of weights 0.
            sa[j] = inside ? s0[at] : 0, sb[j] = inside ? s1[at] : 0;
#pragma unroll
            for (int l = 0; l < LOADS; l++) {
                int word = at * WORDS + 4 * (LOADS == 2 ? l ^ t / 2 : 0);
                a[j][l] = inside ? stream16(w0 + word) : zero;
                b[j][l] = inside ? stream16(w1 + word) : zero;
            }
        }
    };
    let_next_start();
    load(start);
    wait_for_previous();
    if (NORM) stage_normed<WARPS>((const float*)x, norm, xs, stride, squares, tokens, k);
    if (idle) return;
    float d[4] = {0.f, 0.f, 0.f, 0.f};
    for (int i = start; i < blocks; i += DEPTH * step) {
        uint4 was_a[DEPTH][LOADS], was_b[DEPTH][LOADS];
        u32 was_sa[DEPTH], was_sb[DEPTH];
#pragma unroll
        for (int j = 0; j < DEPTH; j++) {
            was_sa[j] = sa[j], was_sb[j] = sb[j];
#pragma unroll
            for (int l = 0; l < LOADS; l++) was_a[j][l] = a[j][l], was_b[j][l] = b[j][l];
        }
        uint4 c[DEPTH][4];
#pragma unroll
        for (int j = 0; j < DEPTH; j++) {
            int at = i + j * step + t;
#pragma unroll
            for (int p = 0; p < 4; p++) {
                // Beyond the end the weights are zeros; what they meet must only be finite.
                const uint4* from = (const uint4*)(xg + (at < blocks ? at : 0) * 32 + 8 * (p ^ (t & 2)));
                c[j][p] = NORM || g < tokens ? *from : zero;
            }
        }
        if (i + DEPTH * step < blocks) load(i + DEPTH * step);
#pragma unroll
        for (int j = 0; j < DEPTH; j++) {
            // The same for all lanes of a warp.
            if (j > 0 && i + j * step >= blocks) break;
            Scale first = scale_of<BITS>(was_sa[j]), second = scale_of<BITS>(was_sb[j]);
            u32 p[4 * LOADS], q[4 * LOADS];
#pragma unroll
            for (int l = 0; l < LOADS; l++) {
                uint4 u = was_a[j][l], v = was_b[j][l];
                if (LOADS == 1 && t >= 2) u = make_uint4(u.z, u.w, u.x, u.y), v = make_uint4(v.z, v.w, v.x, v.y);
                p[4 * l] = u.x, p[4 * l + 1] = u.y, p[4 * l + 2] = u.z, p[4 * l + 3] = u.w;
                q[4 * l] = v.x, q[4 * l + 1] = v.y, q[4 * l + 2] = v.z, q[4 * l + 3] = v.w;
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                uint4 r = unpacked<BITS>(p[e * LOADS], p[e * LOADS + LOADS - 1], first);
                uint4 s = unpacked<BITS>(q[e * LOADS], q[e * LOADS + LOADS - 1], second);
                uint4 v = c[j][e];
                mma(d, r.x, s.x, r.y, s.y, v.x, v.y);
                mma(d, r.z, s.z, r.w, s.w, v.z, v.w);
            }
        }
    }
    finish<WARPS, NORM, SPLIT, FORM>(d, squares, y, row0, row1, tokens, n, k, eps);
}

#define SKINNY_QUANTIZED(NAME, BITS, WARPS, DEPTH, MORE, NORM, SPLIT, FORM)                                            \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, MORE)                                                     \
        NAME##_##BITS(const u32* w, const u32* scales, const void* x, const float* norm, void* y, int tokens, int n,   \
                      int k, float eps) {                                                                              \
        skinny_quantized<BITS, WARPS, DEPTH, NORM, SPLIT, FORM>(w, scales, x, norm, y, tokens, n, k, eps);             \
    }
#define QUANTIZED(BITS, DEPTH)                                                                                         \
    SKINNY_QUANTIZED(skinny_qkv, BITS, 8, DEPTH, 1, true, true, STORE)                                                 \
    SKINNY_QUANTIZED(skinny_add, BITS, 16, DEPTH, 1, false, true, RESIDUAL)                                            \
    SKINNY_QUANTIZED(skinny_swiglu, BITS, 4, DEPTH, 4, true, true, SWIGLU)                                             \
    SKINNY_QUANTIZED(skinny_head, BITS, 8, DEPTH, 2, true, false, LOGITS)                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        unpack_##BITS(const u32* quants, const u32* scales, uint4* out, int eighths) {                                 \
        unpack_all<BITS>(quants, scales, out, eighths);                                                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
        unpack_rows_##BITS(const int* ids, const u32* quants, const u32* scales, uint4* out, int k) {                  \
        unpack_rows<BITS>(ids, quants, scales, out, k);                                                                \
    }
QUANTIZED(4, 2)
QUANTIZED(8, 1)
