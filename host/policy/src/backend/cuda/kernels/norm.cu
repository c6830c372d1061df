// Row-wise operations on the residual stream, which is f32 from the embedding to the last norm.

// x[t] = table[ids[t]]. One block per token. ids: [T], table: [V, H], x: [T, H].
extern "C" __global__ void embed(const int* ids, const bf16* table, float* x, int hidden) {
    const bf16* from = table + (size_t)ids[blockIdx.x] * hidden;
    float* to = x + (size_t)blockIdx.x * hidden;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) to[i] = to_f32(from[i]);
}

// RMSNorm (Zhang & Sennrich 2019): out = x / sqrt(mean(x²) + eps) · weight. One block of 8 warps per row; `rows`
// names the rows of x to take, or is null for all in order. x: [T, H], out: [rows, H].
extern "C" __global__ void __launch_bounds__(256) rms_norm(const float* x, const float* weight, bf16* out,
                                                           const int* rows, int hidden, float eps) {
    __shared__ float part[8];
    int row = rows ? rows[blockIdx.x] : blockIdx.x;
    const float* from = x + (size_t)row * hidden;
    bf16* to = out + (size_t)blockIdx.x * hidden;
    float sum = 0.f;
    for (int i = threadIdx.x; i < hidden; i += 256) sum += from[i] * from[i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.f;
#pragma unroll
    for (int w = 0; w < 8; w++) sum += part[w];
    float scale = rsqrtf(sum / hidden + eps);
    for (int i = threadIdx.x; i < hidden; i += 256) to[i] = to_bf16(from[i] * scale * weight[i]);
}

// out = silu(gate) · up. gate_up: [T, 2F] with the gate first, out: [T, F]; F even. One thread per pair.
extern "C" __global__ void silu_mul(const u32* gate_up, u32* out, int half, int total) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= total) return;
    int row = i / half, column = i % half;
    u32 gate = gate_up[(size_t)row * 2 * half + column], up = gate_up[(size_t)row * 2 * half + half + column];
    float a = low(gate), b = high(gate);
    out[i] = pack(a / (1.f + __expf(-a)) * low(up), b / (1.f + __expf(-b)) * high(up));
}
