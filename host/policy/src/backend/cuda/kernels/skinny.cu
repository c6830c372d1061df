// Products with few tokens: y[t] = W·x[t] for up to 8 tokens, where the weights are read once and nothing else costs.
//
// 16 rows of W are the rows of a tensor-core tile, the tokens its 8 columns. As in attention.cu, lane (g, t) loads 8
// neighbours in k at once and both sides sum over k in that order, so W goes from memory to registers directly.

#define STORE 0     // y: bf16 [T, N]
#define RESIDUAL 1  // y: f32 [T, N], added to
#define SWIGLU 2    // y: bf16 [T, N/2]: silu of the first half of the rows of W times the second half
#define LOGITS 3    // y: f32 [T, N]

// x · norm of all tokens to shared memory, in rows of `stride`, and the sums of squares of x that each warp saw.
template <int WARPS>
static __device__ __forceinline__ void stage_normed(const float* x, const float* norm, bf16* xs, int stride,
                                                    float (*squares)[8], int tokens, int k) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum[8];
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] = 0.f;
    for (int i = threadIdx.x * 4; i < k; i += 128 * WARPS) {
        float4 m = *(const float4*)(norm + i);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float4 v = j < tokens ? *(const float4*)(x + (size_t)j * k + i) : make_float4(0, 0, 0, 0);
            sum[j] += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
            *(uint2*)(xs + j * stride + i) = make_uint2(pack(v.x * m.x, v.y * m.y), pack(v.z * m.z, v.w * m.w));
        }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        if (j < tokens) sum[j] = warp_sum(sum[j]);
        if (lane == 0) squares[warp][j] = sum[j];
    }
    __syncthreads();
}

// Puts a lane's part of the products d to its place; n and k are those of `skinny`.
template <int WARPS, bool NORM, bool SPLIT, int FORM>
static __device__ __forceinline__ void finish(float* d, float (*squares)[8], void* y, int row0, int row1, int tokens, int n,
                                              int k, float eps) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    int all = FORM == SWIGLU ? n / 2 : n;
    if (SPLIT) {
        __shared__ float part[WARPS][32][4];
#pragma unroll
        for (int i = 0; i < 4; i++) part[warp][lane][i] = d[i];
        __syncthreads();
        if (warp != 0) return;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            d[i] = 0.f;
#pragma unroll
            for (int v = 0; v < WARPS; v++) d[i] += part[v][lane][i];
        }
    }
    if (NORM) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float sum = 0.f;
#pragma unroll
            for (int v = 0; v < WARPS; v++) sum += squares[v][2 * t + j];
            float scale = rsqrtf(sum / k + eps);
            d[j] *= scale, d[2 + j] *= scale;
        }
    }
    // d0, d1: row0 of tokens 2t, 2t + 1; d2, d3: row1.
#pragma unroll
    for (int j = 0; j < 2; j++) {
        int token = 2 * t + j;
        if (token >= tokens) break;
        float first = d[j], second = d[2 + j];
        if (FORM == STORE) {
            bf16* to = (bf16*)y + (size_t)token * n;
            to[row0] = to_bf16(first), to[row1] = to_bf16(second);
        } else if (FORM == SWIGLU) {
            ((bf16*)y)[(size_t)token * all + row0] = to_bf16(first / (1.f + __expf(-first)) * second);
        } else {
            float* to = (float*)y + (size_t)token * n;
            to[row0] = first + (FORM == RESIDUAL ? to[row0] : 0.f);
            to[row1] = second + (FORM == RESIDUAL ? to[row1] : 0.f);
        }
    }
}

// NORM: x is f32 [T, K] and normalised on the way: the weights of the norm go into x before the product, the scale of
// each token, known only when all of x has been seen, after it. Otherwise x is bf16 [T, K]. SPLIT: all warps share
// 16 rows and divide k, for few rows; otherwise each warp has 16 rows. K is a multiple of 32, N of 16 (8 outputs of
// SWIGLU). Loads go out in batches of DEPTH before anything waits for one, the first
// batch of weights even before the kernel before this one has ended.
template <int WARPS, int DEPTH, bool NORM, bool SPLIT, int FORM>
static __device__ __forceinline__ void skinny(const bf16* w, const void* x, const float* norm, void* y, int tokens,
                                              int n, int k, float eps) {
    extern __shared__ uint4 space[];
    __shared__ float squares[WARPS][8];
    // Rows of x end with 16 bytes that keep them out of each other's banks.
    bf16* xs = (bf16*)space;
    int stride = k + 8;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int tile = SPLIT ? blockIdx.x : blockIdx.x * WARPS + warp;
    int outputs = FORM == SWIGLU ? 8 : 16, all = FORM == SWIGLU ? n / 2 : n;
    bool idle = !SPLIT && tile * outputs >= all;
    int row0 = tile * outputs + g, row1 = FORM == SWIGLU ? n / 2 + row0 : row0 + 8;
    const bf16 *w0 = w + (size_t)row0 * k + 8 * t, *w1 = w + (size_t)row1 * k + 8 * t;
    const bf16* xg = (const bf16*)x + (size_t)g * k + 8 * t;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    int start = SPLIT ? warp * 32 : 0, step = SPLIT ? 32 * WARPS : 32;
    uint4 a[DEPTH], b[DEPTH], c[DEPTH];
    auto load_w = [&](int i) {
#pragma unroll
        for (int j = 0; j < DEPTH; j++) {
            int at = i + j * step;
            bool inside = at < k && !idle;
            a[j] = inside ? stream16(w0 + at) : zero;
            b[j] = inside ? stream16(w1 + at) : zero;
        }
    };
    auto load_x = [&](int i) {
#pragma unroll
        for (int j = 0; j < DEPTH; j++) {
            int at = i + j * step;
            c[j] = at < k && g < tokens ? *(const uint4*)(xg + at) : zero;
        }
    };
    let_next_start();
    load_w(start);
    wait_for_previous();
    if (!NORM) load_x(start);
    if (NORM) stage_normed<WARPS>((const float*)x, norm, xs, stride, squares, tokens, k);
    if (idle) return;
    float d[4] = {0.f, 0.f, 0.f, 0.f};
    for (int i = start; i < k; i += DEPTH * step) {
        // A deep batch is nearly the whole row and leaves no registers for the next one beside it.
        constexpr bool AHEAD = DEPTH <= 4;
        uint4 was_a[DEPTH], was_b[DEPTH], was_c[DEPTH];
#pragma unroll
        for (int j = 0; j < DEPTH; j++) was_a[j] = a[j], was_b[j] = b[j], was_c[j] = c[j];
        bool more = i + DEPTH * step < k;
        if (AHEAD && more) {
            load_w(i + DEPTH * step);
            if (!NORM) load_x(i + DEPTH * step);
        }
#pragma unroll
        for (int j = 0; j < DEPTH; j++) {
            int at = i + j * step;
            uint4 v = was_c[j];
            // Beyond the end the weights are zeros; what they meet must only be finite.
            if (NORM) v = *(const uint4*)(xs + g * stride + (at < k ? at : 0) + 8 * t);
            uint4 p = was_a[j], q = was_b[j];
            mma(d, p.x, q.x, p.y, q.y, v.x, v.y);
            mma(d, p.z, q.z, p.w, q.w, v.z, v.w);
        }
        if (!AHEAD && more) {
            load_w(i + DEPTH * step);
            if (!NORM) load_x(i + DEPTH * step);
        }
    }
    finish<WARPS, NORM, SPLIT, FORM>(d, squares, y, row0, row1, tokens, n, k, eps);
}

// Few rows need many warps to a row, so that enough loads are under way; many rows need small blocks, so that all of them
// are.
#define SKINNY(NAME, WARPS, DEPTH, MORE, NORM, SPLIT, FORM)                                                                   \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, MORE)                                                   \
        NAME(const bf16* w, const void* x, const float* norm, void* y, int tokens, int n, int k, float eps) {        \
        skinny<WARPS, DEPTH, NORM, SPLIT, FORM>(w, x, norm, y, tokens, n, k, eps);                                          \
    }
SKINNY(skinny_qkv, 8, 4, 1, true, true, STORE)
SKINNY(skinny_add, 16, 4, 1, false, true, RESIDUAL)
SKINNY(skinny_swiglu, 4, 8, 5, true, true, SWIGLU)
SKINNY(skinny_head, 8, 4, 2, true, false, LOGITS)
