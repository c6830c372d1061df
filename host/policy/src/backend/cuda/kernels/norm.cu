// Row-wise operations on the residual stream, which is f32 from the embedding to the last norm.

// x[t] = table[ids[t]], or table[t] without ids. One block per token. ids: [T], table: [V, H], x: [T, H]. It begins a step, and
// lets nobody start before all of the step before has ended: attention relies on that.
extern "C" __global__ void embed(const int* ids, const bf16* table, float* x, int hidden) {
    wait_for_previous();
    let_next_start();
    const uint2* from = (const uint2*)(table + (size_t)(ids ? ids[blockIdx.x] : blockIdx.x) * hidden);
    float4* to = (float4*)(x + (size_t)blockIdx.x * hidden);
    for (int i = threadIdx.x; i < hidden / 4; i += blockDim.x) {
        uint2 v = from[i];
        to[i] = make_float4(low(v.x), high(v.x), low(v.y), high(v.y));
    }
}

// The same, and what hopper.cu's products expect beside x: h = x · norm as bf16, and the sum of squares of each token in sums, [T].
extern "C" __global__ void __launch_bounds__(256) embed_normed(const int* ids, const bf16* table, const float* norm, float* x,
                                                               bf16* h, float* sums, int hidden) {
    __shared__ float part[8];
    wait_for_previous();
    let_next_start();
    const uint2* from = (const uint2*)(table + (size_t)(ids ? ids[blockIdx.x] : blockIdx.x) * hidden);
    float4* to = (float4*)(x + (size_t)blockIdx.x * hidden);
    uint2* normed = (uint2*)(h + (size_t)blockIdx.x * hidden);
    float sum = 0.f;
    for (int i = threadIdx.x; i < hidden / 4; i += blockDim.x) {
        uint2 u = from[i];
        float4 v = make_float4(low(u.x), high(u.x), low(u.y), high(u.y)), w = ((const float4*)norm)[i];
        to[i] = v;
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        normed[i] = make_uint2(pack(v.x * w.x, v.y * w.y), pack(v.z * w.z, v.w * w.w));
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        sum = 0.f;
        for (int i = 0; i < 8; i++) sum += part[i];
        sums[blockIdx.x] = sum;
    }
}

// RMSNorm (Zhang & Sennrich 2019): out = x / sqrt(mean(x²) + eps) · weight, after x += delta where there is one. One block
// of 8 warps per row; `rows` names the rows of x to take, or is null for all in order. x: [T, H], delta: [T, H] or null,
// out: [rows, H]; H is a multiple of 4 and at most 8192: a thread keeps what it has read.
extern "C" __global__ void __launch_bounds__(256) rms_norm(float* x, const bf16* delta, const float* weight, bf16* out,
                                                           const int* rows, int hidden, float eps) {
    __shared__ float part[8];
    let_next_start();
    wait_for_previous();
    int row = rows ? rows[blockIdx.x] : blockIdx.x;
    float4* from = (float4*)(x + (size_t)row * hidden);
    const uint2* add = delta ? (const uint2*)(delta + (size_t)row * hidden) : (const uint2*)0;
    uint2* to = (uint2*)(out + (size_t)blockIdx.x * hidden);
    int quarter = hidden / 4;
    float4 v[8], w[8];
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        int i = threadIdx.x + 256 * j;
        if (i < quarter) {
            v[j] = from[i];
            w[j] = ((const float4*)weight)[i];
            if (add) {
                uint2 d = add[i];
                v[j].x += low(d.x), v[j].y += high(d.x), v[j].z += low(d.y), v[j].w += high(d.y);
                from[i] = v[j];
            }
            sum += v[j].x * v[j].x + v[j].y * v[j].y + v[j].z * v[j].z + v[j].w * v[j].w;
        }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += part[i];
    float scale = rsqrtf(sum / hidden + eps);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        int i = threadIdx.x + 256 * j;
        if (i < quarter)
            to[i] = make_uint2(pack(v[j].x * scale * w[j].x, v[j].y * scale * w[j].y),
                               pack(v[j].z * scale * w[j].z, v[j].w * scale * w[j].w));
    }
}

// The same with a warp per row, which needs no barrier, for H up to 128 · QUARTERS. Four rows a block. On an H200 and H = 896 it
// takes 2.6 µs instead of 3.4 at 512 rows, and more than a block per row at 256 and fewer.
template <int QUARTERS>
static __device__ __forceinline__ void norm_row(float* x, const bf16* delta, const float* weight, bf16* out, const int* rows,
                                                int count, int hidden, float eps) {
    int lane = threadIdx.x % 32, at = blockIdx.x * 4 + threadIdx.x / 32, quarter = hidden / 4;
    let_next_start();
    float4 v[QUARTERS], w[QUARTERS];
#pragma unroll
    for (int j = 0; j < QUARTERS; j++)
        if (lane + 32 * j < quarter) w[j] = ((const float4*)weight)[lane + 32 * j];
    wait_for_previous();
    if (at >= count) return;
    int row = rows ? rows[at] : at;
    float4* from = (float4*)(x + (size_t)row * hidden);
    const uint2* add = (const uint2*)(delta + (size_t)row * hidden);
    uint2 d[QUARTERS];
#pragma unroll
    for (int j = 0; j < QUARTERS; j++) {
        int i = lane + 32 * j;
        d[j] = make_uint2(0, 0), v[j] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (i < quarter) v[j] = from[i];
        if (i < quarter && delta) d[j] = add[i];
    }
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < QUARTERS; j++) {
        v[j].x += low(d[j].x), v[j].y += high(d[j].x), v[j].z += low(d[j].y), v[j].w += high(d[j].y);
        sum += v[j].x * v[j].x + v[j].y * v[j].y + v[j].z * v[j].z + v[j].w * v[j].w;
    }
    float scale = rsqrtf(warp_sum(sum) / hidden + eps);
    uint2* to = (uint2*)(out + (size_t)at * hidden);
#pragma unroll
    for (int j = 0; j < QUARTERS; j++) {
        int i = lane + 32 * j;
        if (i >= quarter) continue;
        to[i] = make_uint2(pack(v[j].x * scale * w[j].x, v[j].y * scale * w[j].y),
                           pack(v[j].z * scale * w[j].z, v[j].w * scale * w[j].w));
        if (delta) from[i] = v[j];
    }
}

#define NORM_ROWS(QUARTERS)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128)                                                                       \
        norm_rows_##QUARTERS(float* x, const bf16* delta, const float* weight, bf16* out, const int* rows, int count,       \
                             int hidden, float eps) {                                                                       \
        norm_row<QUARTERS>(x, delta, weight, out, rows, count, hidden, eps);                                                \
    }
NORM_ROWS(8)
NORM_ROWS(16)

static __device__ __forceinline__ u32 swiglu(u32 gate, u32 up) {
    float a = low(gate), b = high(gate);
    return pack(a / (1.f + __expf(-a)) * low(up), b / (1.f + __expf(-b)) * high(up));
}

// out = silu(gate) · up. gate_up: [T, 2F] with the gate first, out: [T, F]; `eighth` is F / 8. Grid: (⌈F / 8 / 256⌉, T).
extern "C" __global__ void __launch_bounds__(256) silu_mul(const uint4* gate_up, uint4* out, int eighth) {
    int i = blockIdx.x * 256 + threadIdx.x;
    let_next_start();
    wait_for_previous();
    if (i >= eighth) return;
    const uint4* row = gate_up + (size_t)blockIdx.y * 2 * eighth;
    uint4 g = row[i], u = row[eighth + i];
    out[(size_t)blockIdx.y * eighth + i] =
        make_uint4(swiglu(g.x, u.x), swiglu(g.y, u.y), swiglu(g.z, u.z), swiglu(g.w, u.w));
}
