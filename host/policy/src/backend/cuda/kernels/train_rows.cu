// Row-wise operations of training and their gradients. Sums over rows are made in two stages of fixed order: every block leaves
// its part, and `sum_parts` adds the parts up. What a part holds depends on the grid alone, so the same grid gives the same bits.

// Sum over a block of 256 threads, the same bits in each. `part` must not be written again before the next barrier.
static __device__ __forceinline__ float block_sum(float x, float* part) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) x += part[i];
    return x;
}

static __device__ __forceinline__ float4 widen(uint2 x) { return make_float4(low(x.x), high(x.x), low(x.y), high(x.y)); }
static __device__ __forceinline__ uint2 narrow(float4 x) { return make_uint2(pack(x.x, x.y), pack(x.z, x.w)); }

template <int N>
static __device__ __forceinline__ void rms_norm_save(float* x, const bf16* delta, const float* weight, const int* rows,
                                                     bf16* saved, bf16* out, float* rstd, int hidden, float eps) {
    __shared__ float part[8];
    let_next_start();
    wait_for_previous();
    int row = rows ? rows[blockIdx.x] : blockIdx.x;
    float4* from = (float4*)(x + (size_t)row * hidden);
    const uint2* add = delta ? (const uint2*)(delta + (size_t)row * hidden) : (const uint2*)0;
    size_t at = (size_t)blockIdx.x * hidden;
    float4 v[N];
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < N; j++) {
        int i = threadIdx.x + 256 * j;
        if (i >= hidden / 4) continue;
        v[j] = from[i];
        if (add) {
            float4 d = widen(add[i]);
            v[j].x += d.x, v[j].y += d.y, v[j].z += d.z, v[j].w += d.w;
            from[i] = v[j];
        }
        if (saved) ((uint2*)(saved + at))[i] = narrow(v[j]);
        sum += v[j].x * v[j].x + v[j].y * v[j].y + v[j].z * v[j].z + v[j].w * v[j].w;
    }
    float scale = rsqrtf(block_sum(sum, part) / hidden + eps);
    if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
#pragma unroll
    for (int j = 0; j < N; j++) {
        int i = threadIdx.x + 256 * j;
        if (i >= hidden / 4) continue;
        float4 w = ((const float4*)weight)[i];
        ((uint2*)(out + at))[i] = narrow(make_float4(v[j].x * scale * w.x, v[j].y * scale * w.y, v[j].z * scale * w.z,
                                                     v[j].w * scale * w.w));
    }
}

// RMSNorm (Zhang & Sennrich 2019) with what its gradient needs: y = x + delta, out = y · rstd · weight, rstd = 1/√(mean(y²) + eps).
// x: [T, H] f32, in place; delta: [T, H] or null; weight: [H]; rows: the rows of x to take, [grid], or null for all in order
// (with delta each at most once); saved: [grid, H] y as bf16, or null; out: [grid, H]; rstd: [grid]. One block of 256 threads
// per row; H a multiple of 4, at most 1024·N for rms_norm_save_N, N = 1, 2, 4, 8.
#define RMS_NORM(N)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                            \
        rms_norm_save_##N(float* x, const bf16* delta, const float* weight, const int* rows, bf16* saved, bf16* out,             \
                          float* rstd, int hidden, float eps) {                                                                  \
        rms_norm_save<N>(x, delta, weight, rows, saved, out, rstd, hidden, eps);                                                 \
    }
RMS_NORM(1) RMS_NORM(2) RMS_NORM(4) RMS_NORM(8)

// out = saved · rstd · weight: the norm's output again, for a pass that did not keep it. saved, out: [grid, H]; rstd: [grid].
// One block of 256 threads per row; H a multiple of 4.
extern "C" __global__ void __launch_bounds__(256) rms_norm_again(const bf16* saved, const float* rstd, const float* weight,
                                                                 bf16* out, int hidden) {
    let_next_start();
    wait_for_previous();
    size_t at = (size_t)blockIdx.x * hidden;
    float scale = rstd[blockIdx.x];
    for (int i = threadIdx.x; i < hidden / 4; i += 256) {
        float4 v = widen(((const uint2*)(saved + at))[i]), w = ((const float4*)weight)[i];
        ((uint2*)(out + at))[i] = narrow(make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w));
    }
}

template <int N>
static __device__ __forceinline__ void rms_norm_backward(const bf16* saved, const float* rstd, const float* weight,
                                                         const bf16* dout, float* dx, bf16* dx16, float* part, int rows,
                                                         int hidden, int add) {
    // Two, so that a row needs one barrier.
    __shared__ float shared[2][8];
    float4 w[N], dweight[N];
    let_next_start();
    wait_for_previous();
#pragma unroll
    for (int j = 0; j < N; j++) {
        int i = threadIdx.x + 256 * j;
        dweight[j] = make_float4(0.f, 0.f, 0.f, 0.f);
        w[j] = i < hidden / 4 ? ((const float4*)weight)[i] : dweight[j];
    }
    int turn = 0;
    for (int row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 1) {
        size_t at = (size_t)row * hidden;
        float scale = rstd[row], sum = 0.f;
        float4 n[N], d[N], old[N];
#pragma unroll
        for (int j = 0; j < N; j++) {
            int i = threadIdx.x + 256 * j;
            n[j] = d[j] = old[j] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (i >= hidden / 4) continue;
            n[j] = widen(((const uint2*)(saved + at))[i]), d[j] = widen(((const uint2*)(dout + at))[i]);
            if (add) old[j] = ((const float4*)(dx + at))[i];
            n[j].x *= scale, n[j].y *= scale, n[j].z *= scale, n[j].w *= scale;
            dweight[j].x += d[j].x * n[j].x, dweight[j].y += d[j].y * n[j].y;
            dweight[j].z += d[j].z * n[j].z, dweight[j].w += d[j].w * n[j].w;
            d[j].x *= w[j].x, d[j].y *= w[j].y, d[j].z *= w[j].z, d[j].w *= w[j].w;
            sum += d[j].x * n[j].x + d[j].y * n[j].y + d[j].z * n[j].z + d[j].w * n[j].w;
        }
        float mean = block_sum(sum, shared[turn]) / hidden;
#pragma unroll
        for (int j = 0; j < N; j++) {
            int i = threadIdx.x + 256 * j;
            if (i >= hidden / 4) continue;
            float4 g = make_float4(old[j].x + scale * (d[j].x - n[j].x * mean), old[j].y + scale * (d[j].y - n[j].y * mean),
                                   old[j].z + scale * (d[j].z - n[j].z * mean), old[j].w + scale * (d[j].w - n[j].w * mean));
            ((float4*)(dx + at))[i] = g;
            if (dx16) ((uint2*)(dx16 + at))[i] = narrow(g);
        }
    }
    if (!part) return;
#pragma unroll
    for (int j = 0; j < N; j++) {
        int i = threadIdx.x + 256 * j;
        if (i < hidden / 4) ((float4*)(part + (size_t)blockIdx.x * hidden))[i] = dweight[j];
    }
}

// Gradient of the norm: with n = saved · rstd, dx (+)= rstd · (weight · dout − n · mean(weight · dout · n)); part = Σ dout · n.
// saved, dout: [rows, H] bf16; rstd: [rows]; dx: [rows, H] f32, added to where `add`, else written; dx16: the result as bf16,
// or null; part: [grid, H] f32 or null. Grid: any number of blocks of 256 threads; block b takes rows b, b + grid, ….
// H as in rms_norm_save_N.
#define RMS_NORM_BACKWARD(N)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                                                            \
        rms_norm_backward_##N(const bf16* saved, const float* rstd, const float* weight, const bf16* dout, float* dx,            \
                              bf16* dx16, float* part, int rows, int hidden, int add) {                                          \
        rms_norm_backward<N>(saved, rstd, weight, dout, dx, dx16, part, rows, hidden, add);                                      \
    }
RMS_NORM_BACKWARD(1) RMS_NORM_BACKWARD(2) RMS_NORM_BACKWARD(4) RMS_NORM_BACKWARD(8)

// to[c] (+)= Σ parts[i][c], in a fixed order. parts: [n, cols] f32, to: [cols] f32, added to where `add`. Grid: ⌈cols / 32⌉ blocks
// of 256 threads.
extern "C" __global__ void __launch_bounds__(256) sum_parts(const float* parts, float* to, int n, int cols, int add) {
    __shared__ float shared[8][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    let_next_start();
    wait_for_previous();
    float sum = 0.f;
    if (c < cols)
#pragma unroll 4
        for (int i = warp; i < n; i += 8) sum += parts[(size_t)i * cols + c];
    shared[warp][lane] = sum;
    __syncthreads();
    if (warp || c >= cols) return;
    sum = add ? to[c] : 0.f;
    for (int i = 0; i < 8; i++) sum += shared[i][lane];
    to[c] = sum;
}

static __device__ __forceinline__ void widen8(float to[8], uint4 x) {
    to[0] = low(x.x), to[1] = high(x.x), to[2] = low(x.y), to[3] = high(x.y);
    to[4] = low(x.z), to[5] = high(x.z), to[6] = low(x.w), to[7] = high(x.w);
}
static __device__ __forceinline__ uint4 narrow8(const float x[8]) {
    return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}

// Column sums of a matrix, first stage: part[b][c] = Σ x[r][c] over the rows of block b. x: [rows, stride] bf16, of which cols
// columns count (stride and cols multiples of 8); part: [gridDim.y, cols]. Grid: (⌈cols / 256⌉, parts), 256 threads.
extern "C" __global__ void __launch_bounds__(256) column_sums(const bf16* x, float* part, int rows, int cols, int stride) {
    __shared__ float shared[8][256];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 256 + lane * 8;
    let_next_start();
    wait_for_previous();
    float sum[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
    if (c < cols)
#pragma unroll 4
        for (int r = blockIdx.y * 8 + warp; r < rows; r += 8 * gridDim.y) {
            float v[8];
            widen8(v, *(const uint4*)(x + (size_t)r * stride + c));
            for (int i = 0; i < 8; i++) sum[i] += v[i];
        }
    for (int i = 0; i < 8; i++) shared[warp][lane * 8 + i] = sum[i];
    __syncthreads();
    c = blockIdx.x * 256 + threadIdx.x;
    if (c >= cols) return;
    float total = 0.f;
    for (int i = 0; i < 8; i++) total += shared[i][threadIdx.x];
    part[(size_t)blockIdx.y * cols + c] = total;
}

// Gradient of out = silu(gate) · up. gate_up: [T, 2F], gate first; dact: [T, F]; dgate_up: [T, 2F], may be gate_up itself;
// act: [T, F], silu(gate) · up again for the weight gradient of what follows, may be dact itself, or null. `eighth` is F / 8.
// Grid: ⌈T · F / 8 / 256⌉ blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) swiglu_backward(const uint4* gate_up, const uint4* dact, uint4* dgate_up,
                                                                  uint4* act, int eighth, int tokens) {
    int item = blockIdx.x * 256 + threadIdx.x;
    let_next_start();
    wait_for_previous();
    if (item >= tokens * eighth) return;
    size_t at = (size_t)(item / eighth) * 2 * eighth + item % eighth;
    float g[8], u[8], d[8], a[8];
    widen8(g, gate_up[at]), widen8(u, gate_up[at + eighth]), widen8(d, dact[item]);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float sigmoid = 1.f / (1.f + __expf(-g[i])), silu = g[i] * sigmoid;
        a[i] = silu * u[i];
        u[i] = d[i] * u[i] * sigmoid * (1.f + g[i] * (1.f - sigmoid));
        d[i] *= silu;
    }
    dgate_up[at] = narrow8(u);
    dgate_up[at + eighth] = narrow8(d);
    if (act) act[item] = narrow8(a);
}

// The fused projection on its way to attention, and the gradient on its way back.
struct TrainProjection {
    const bf16* qkv;                              // [T, (Q + 2K)·D] as the product left it
    const float *bias, *q_norm, *k_norm, *rope;   // [(Q + 2K)·D], [D], [D] or null; [positions, D]: D/2 cosines, D/2 sines
    const int* positions;                         // [T]
    int tokens, q_heads, kv_heads, dim;           // dim: 32, 64, 96 or 128
    float eps;
};

static __device__ __forceinline__ void read8(float to[8], const float* from) {
    float4 a = ((const float4*)from)[0], b = ((const float4*)from)[1];
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

// 8 of the pairs (i, i + D/2) that rotation turns, of one head of one token, as one lane has them. LANES lanes have a head, so
// that a warp has 32 / LANES of them; a lane beyond D / 16 has none.
template <int D>
struct Pairs {
    static constexpr int LANES = D == 32 ? 2 : D == 64 ? 4 : 8;
    float x[8], y[8];

    static __device__ __forceinline__ int first() { return threadIdx.x % LANES * 8; }
    static __device__ __forceinline__ bool any() { return first() < D / 2; }

    __device__ __forceinline__ void read(const bf16* from) {
        widen8(x, *(const uint4*)(from + first())), widen8(y, *(const uint4*)(from + D / 2 + first()));
    }
    __device__ __forceinline__ void read(const float* from) { read8(x, from + first()), read8(y, from + D / 2 + first()); }
    __device__ __forceinline__ void write(bf16* to) const {
        *(uint4*)(to + first()) = narrow8(x), *(uint4*)(to + D / 2 + first()) = narrow8(y);
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = y[i] = 0.f;
    }
    __device__ __forceinline__ void add(const Pairs& o) {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] += o.x[i], y[i] += o.y[i];
    }
    __device__ __forceinline__ void scale(float by) {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] *= by, y[i] *= by;
    }
    __device__ __forceinline__ void times(const Pairs& o) {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] *= o.x[i], y[i] *= o.y[i];
    }
    // Product of the whole heads, by all lanes of a warp.
    __device__ __forceinline__ float dot(const Pairs& o) const {
        float sum = 0.f;
        if (any())
#pragma unroll
            for (int i = 0; i < 8; i++) sum += x[i] * o.x[i] + y[i] * o.y[i];
#pragma unroll
        for (int o = LANES / 2; o; o >>= 1) sum += __shfl_xor_sync(FULL, sum, o);
        return sum;
    }
    // By the angles of one position; `side` −1 turns back. rope: [D].
    __device__ __forceinline__ void rotate(const float* rope, float side) {
        float cosine[8], sine[8];
        read8(cosine, rope + first()), read8(sine, rope + D / 2 + first());
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float a = x[i], b = y[i];
            x[i] = a * cosine[i] - b * side * sine[i];
            y[i] = b * cosine[i] + a * side * sine[i];
        }
    }
};

// Which head of which token a lane works on. All lanes of a warp go through the same number of them, for the shuffles' sake.
template <int D, typename Work>
static __device__ __forceinline__ void for_heads(const TrainProjection& p, Work work) {
    constexpr int PER_WARP = 32 / Pairs<D>::LANES;
    int heads = p.q_heads + 2 * p.kv_heads, items = p.tokens * heads;
    int warp = (blockIdx.x * 256 + threadIdx.x) / 32, warps = gridDim.x * 8;
    for (int base = warp * PER_WARP; base < items; base += warps * PER_WARP) {
        int item = base + threadIdx.x % 32 / Pairs<D>::LANES;
        bool real = item < items && Pairs<D>::any();
        work(real, item < items ? item / heads : 0, item < items ? item % heads : 0);
    }
}

// The head before its norm. Lanes without pairs get zeros.
template <int D>
static __device__ __forceinline__ void take(Pairs<D>& v, const TrainProjection& p, bool real, int token, int head) {
    v.clear();
    if (!real) return;
    v.read(p.qkv + ((size_t)token * (p.q_heads + 2 * p.kv_heads) + head) * D);
    if (p.bias) {
        Pairs<D> b;
        b.read(p.bias + head * D);
        v.add(b);
    }
}

template <int D>
static __device__ __forceinline__ void qkv_rope(const TrainProjection& p, bf16* to) {
    for_heads<D>(p, [&](bool real, int token, int head) {
        bool is_v = head >= p.q_heads + p.kv_heads;
        Pairs<D> v;
        take(v, p, real, token, head);
        if (p.q_norm) {
            float scale = rsqrtf(v.dot(v) / D + p.eps);
            if (real && !is_v) {
                Pairs<D> w;
                w.read(head < p.q_heads ? p.q_norm : p.k_norm);
                v.scale(scale);
                v.times(w);
            }
        }
        if (!real) return;
        if (!is_v) v.rotate(p.rope + (size_t)p.positions[token] * D, 1.f);
        v.write(to + ((size_t)token * (p.q_heads + 2 * p.kv_heads) + head) * D);
    });
}

// Calls F<D>(…) for the head size at hand.
#define BY_DIM(F, ...)                                   \
    if (p.dim == 32) F<32>(__VA_ARGS__);                 \
    else if (p.dim == 64) F<64>(__VA_ARGS__);            \
    else if (p.dim == 96) F<96>(__VA_ARGS__);            \
    else F<128>(__VA_ARGS__)

// Bias, norm of the head (Qwen3), rotation (Su et al. 2021). to: [T, (Q + 2K)·D], may be p.qkv; with q_norm the gradient needs
// p.qkv untouched, so then it should not be. q_norm and k_norm come together. Grid: any number of blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) qkv_rope(const __grid_constant__ TrainProjection p, bf16* to) {
    let_next_start();
    wait_for_previous();
    BY_DIM(qkv_rope, p, to);
}

// part: [grid, 2·D] of this block, the sums of the norms' gradients over its lanes and warps.
template <int D>
static __device__ __forceinline__ void put_norm_parts(Pairs<D> (&sums)[2], float* part) {
    __shared__ float shared[8][2 * D];
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < 2; k++) {
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int o = 16; o >= Pairs<D>::LANES; o >>= 1) {
                sums[k].x[i] += __shfl_xor_sync(FULL, sums[k].x[i], o);
                sums[k].y[i] += __shfl_xor_sync(FULL, sums[k].y[i], o);
            }
        float* to = shared[threadIdx.x / 32] + k * D + Pairs<D>::first();
        if (lane < Pairs<D>::LANES && Pairs<D>::any())
            for (int i = 0; i < 8; i++) to[i] = sums[k].x[i], to[D / 2 + i] = sums[k].y[i];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < 2 * D; c += 256) {
        float sum = 0.f;
        for (int i = 0; i < 8; i++) sum += shared[i][c];
        part[(size_t)blockIdx.x * 2 * D + c] = sum;
    }
}

template <int D, bool NORMED>
static __device__ __forceinline__ void qkv_backward(const TrainProjection& p, bf16* dqkv, const float* dkv, int splits,
                                                    float* part) {
    Pairs<D> sums[2];
    sums[0].clear(), sums[1].clear();
    for_heads<D>(p, [&](bool real, int token, int head) {
        bool is_q = head < p.q_heads, is_v = head >= p.q_heads + p.kv_heads;
        bf16* at = dqkv + ((size_t)token * (p.q_heads + 2 * p.kv_heads) + head) * D;
        Pairs<D> d;
        d.clear();
        if (real && is_q) d.read(at);
        if (real && !is_q)
            for (int s = 0; s < splits; s++) {
                Pairs<D> one;
                one.read(dkv + (((size_t)s * p.tokens + token) * 2 * p.kv_heads + head - p.q_heads) * D);
                d.add(one);
            }
        if (real && !is_v) d.rotate(p.rope + (size_t)p.positions[token] * D, -1.f);
        if (NORMED) {
            // n: what the norm made of the head before its weight; d: dn/√… of it, as in rms_norm_backward.
            Pairs<D> n;
            take(n, p, real, token, head);
            float scale = rsqrtf(n.dot(n) / D + p.eps);
            n.scale(scale);
            Pairs<D> w, dn = d;
            w.clear();
            if (real) w.read(is_q ? p.q_norm : p.k_norm);
            dn.times(w);
            float mean = dn.dot(n) / D;
            if (real && !is_v) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    float x = d.x[i] * n.x[i], y = d.y[i] * n.y[i];
                    sums[0].x[i] += is_q ? x : 0.f, sums[0].y[i] += is_q ? y : 0.f;
                    sums[1].x[i] += is_q ? 0.f : x, sums[1].y[i] += is_q ? 0.f : y;
                    d.x[i] = scale * (dn.x[i] - n.x[i] * mean), d.y[i] = scale * (dn.y[i] - n.y[i] * mean);
                }
            }
        }
        if (real) d.write(at);
    });
    if (NORMED) put_norm_parts(sums, part);
}
template <int D>
static __device__ __forceinline__ void plain_backward(const TrainProjection& p, bf16* dqkv, const float* dkv, int splits) {
    qkv_backward<D, false>(p, dqkv, dkv, splits, 0);
}
template <int D>
static __device__ __forceinline__ void normed_backward(const TrainProjection& p, bf16* dqkv, const float* dkv, int splits,
                                                       float* part) {
    qkv_backward<D, true>(p, dqkv, dkv, splits, part);
}

// The gradient of that. dqkv: [T, (Q + 2K)·D], holds the gradient of rotated queries in its first Q·D columns, and all columns
// of the gradient of the product (before the bias) afterwards; dkv: [splits, T, 2K·D] from attend_dkv, summed in order.
// The bias' gradient is the column sums of dqkv. Grid: any number of blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) qkv_rope_backward(const __grid_constant__ TrainProjection p, bf16* dqkv,
                                                                    const float* dkv, int splits) {
    let_next_start();
    wait_for_previous();
    BY_DIM(plain_backward, p, dqkv, dkv, splits);
}
// The same with q_norm and k_norm, whose gradients it leaves in part: [grid, 2·D].
extern "C" __global__ void __launch_bounds__(256) qkv_rope_backward_normed(const __grid_constant__ TrainProjection p, bf16* dqkv,
                                                                           const float* dkv, int splits, float* part) {
    let_next_start();
    wait_for_previous();
    BY_DIM(normed_backward, p, dqkv, dkv, splits, part);
}

// Rows of a gradient summed by where they belong: to[ids[b]] += Σ from[rows[i]], i from starts[b] to starts[b + 1], in an order
// that depends on the list's length alone. ids: [lists], distinct; starts: [lists + 1]; rows: indices into from; from: [·, H],
// to: [·, H] f32; H a multiple of 4. Embedding: ids are of the vocabulary, to the table's gradient; scored tokens: ids are
// tokens of T, to the gradient of the last hidden states. Grid: (lists, any), 256 threads; in y up to ⌈H / 128⌉ blocks share a
// list of 8 or more, and more than one is wasted on shorter ones.
extern "C" __global__ void __launch_bounds__(256) scatter_rows(const int* ids, const int* starts, const int* rows,
                                                               const float* from, float* to, int hidden) {
    __shared__ float4 shared[8][32];
    let_next_start();
    wait_for_previous();
    int begin = starts[blockIdx.x], end = starts[blockIdx.x + 1], quarter = hidden / 4;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float4* target = (float4*)(to + (size_t)ids[blockIdx.x] * hidden);
    auto add = [](float4& sum, float4 x) { sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w; };
    if (end - begin < 8) {
        if (blockIdx.y) return;
        for (int i = threadIdx.x; i < quarter; i += 256) {
            float4 sum = target[i];
            for (int r = begin; r < end; r++) add(sum, ((const float4*)(from + (size_t)rows[r] * hidden))[i]);
            target[i] = sum;
        }
        return;
    }
    for (int first = blockIdx.y * 32; first < quarter; first += gridDim.y * 32) {
        int i = first + lane;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        if (i < quarter)
#pragma unroll 4
            for (int r = begin + warp; r < end; r += 8) add(sum, ((const float4*)(from + (size_t)rows[r] * hidden))[i]);
        shared[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && i < quarter) {
            sum = target[i];
            for (int w = 0; w < 8; w++) add(sum, shared[w][lane]);
            target[i] = sum;
        }
        __syncthreads();
    }
}
