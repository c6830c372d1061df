// The optimizer: all tensors in one launch, from a table of them and a table of their chunks.

// Numbers of a chunk; a block of 256 threads takes one.
#define CHUNK 16384

// A trainable tensor. Its arrays are 16-byte aligned.
struct Trained {
    float* master;     // [n]
    void *m, *v;       // [n] moments, f32 or bf16
    const void* grad;  // [n] f32 or bf16
    bf16* weight;      // [n] what the model computes with, or null where that is the master itself
    u64 n;
    float decay;       // 1 − learning rate · weight decay
    int pad;           // to 56 bytes
};

// Constants of an update, as backend/cpu/params.rs has them.
struct AdamW {
    float beta1, beta2;
    float rate;    // learning rate / (1 − β₁ᵗ)
    float second;  // 1 / √(1 − β₂ᵗ)
    float eps;
};

// Four numbers, of which `count` exist; the others are zeros.
static __device__ __forceinline__ void read4(float to[4], const float* from, int count) {
    if (count >= 4) {
        float4 v = *(const float4*)from;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else {
        for (int i = 0; i < 4; i++) to[i] = i < count ? from[i] : 0.f;
    }
}
static __device__ __forceinline__ void read4(float to[4], const bf16* from, int count) {
    if (count >= 4) {
        uint2 v = *(const uint2*)from;
        to[0] = low(v.x), to[1] = high(v.x), to[2] = low(v.y), to[3] = high(v.y);
    } else {
        for (int i = 0; i < 4; i++) to[i] = i < count ? to_f32(from[i]) : 0.f;
    }
}
static __device__ __forceinline__ void write4(float* to, const float from[4], int count) {
    if (count >= 4)
        *(float4*)to = make_float4(from[0], from[1], from[2], from[3]);
    else
        for (int i = 0; i < 4; i++)
            if (i < count) to[i] = from[i];
}
static __device__ __forceinline__ void write4(bf16* to, const float from[4], int count) {
    if (count >= 4)
        *(uint2*)to = make_uint2(pack(from[0], from[1]), pack(from[2], from[3]));
    else
        for (int i = 0; i < 4; i++)
            if (i < count) to[i] = to_bf16(from[i]);
}

// The numbers of a chunk that a thread has, four at a time: work(place in the tensor, how many there are from there on).
template <typename Work>
static __device__ __forceinline__ void for_chunk(const Trained& t, int chunk, Work work) {
    u64 from = (u64)chunk * CHUNK;
    int count = (int)min(t.n - from, (u64)CHUNK);
#pragma unroll 2
    for (int i = threadIdx.x * 4; i < count; i += 1024) work(from + i, count - i);
}

template <typename Grad>
static __device__ __forceinline__ void chunk_squares(const Trained* tensors, const int2* chunks, double* part) {
    __shared__ double shared[256];
    let_next_start();
    wait_for_previous();
    int2 chunk = chunks[blockIdx.x];
    Trained t = tensors[chunk.x];
    double sum = 0.;
    for_chunk(t, chunk.y, [&](u64 at, int count) {
        float g[4];
        read4(g, (const Grad*)t.grad + at, count);
        for (int i = 0; i < 4; i++) sum += (double)g[i] * (double)g[i];
    });
    shared[threadIdx.x] = sum;
    for (int o = 128; o; o >>= 1) {
        __syncthreads();
        if (threadIdx.x < o) shared[threadIdx.x] += shared[threadIdx.x + o];
    }
    if (threadIdx.x == 0) part[blockIdx.x] = shared[0];
}

// Sum of squares of each chunk of gradients, f32 or bf16. chunks: [grid] tensor, number of the chunk in it; part: [grid] f64, not
// finite where a gradient is not. 256 threads.
extern "C" __global__ void __launch_bounds__(256) sum_squares(const Trained* tensors, const int2* chunks, double* part) {
    chunk_squares<float>(tensors, chunks, part);
}
extern "C" __global__ void __launch_bounds__(256) sum_squares_bf16(const Trained* tensors, const int2* chunks, double* part) {
    chunk_squares<bf16>(tensors, chunks, part);
}

// norm[0] = √Σ part · scale, the global 2-norm of scale · gradient; norm[1] = scale · clip, clip = max_norm / (norm + 1e-6) where
// the norm exceeds max_norm > 0, else 1; norm[1] is NaN when the norm is not finite, and `adamw` then changes nothing.
// part: [n]; norm: [2] f32; scale > 0. One block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) global_norm(const double* part, float* norm, int n, float scale,
                                                               float max_norm) {
    __shared__ double shared[1024];
    let_next_start();
    wait_for_previous();
    double sum = 0.;
    for (int i = threadIdx.x; i < n; i += 1024) sum += part[i];
    shared[threadIdx.x] = sum;
    for (int o = 512; o; o >>= 1) {
        __syncthreads();
        if (threadIdx.x < o) shared[threadIdx.x] += shared[threadIdx.x + o];
    }
    if (threadIdx.x) return;
    double total = sqrt(shared[0]) * scale;
    double clip = max_norm > 0.f && total > max_norm ? max_norm / (total + 1e-6) : 1.;
    norm[0] = (float)total;
    norm[1] = isfinite(total) ? (float)(scale * clip) : __uint_as_float(0x7fc00000u);
}

template <typename Moment, typename Grad>
static __device__ __forceinline__ void adamw(const Trained* tensors, const int2* chunks, const float* norm, const AdamW& c) {
    let_next_start();
    wait_for_previous();
    float scale = norm[1];
    if (!isfinite(scale)) return;
    int2 chunk = chunks[blockIdx.x];
    Trained t = tensors[chunk.x];
    for_chunk(t, chunk.y, [&](u64 at, int count) {
        float w[4], m[4], v[4], g[4];
        read4(g, (const Grad*)t.grad + at, count);
        read4(m, (const Moment*)t.m + at, count);
        read4(v, (const Moment*)t.v + at, count);
        read4(w, t.master + at, count);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x = g[i] * scale;
            m[i] += (1.f - c.beta1) * (x - m[i]);
            v[i] += (1.f - c.beta2) * (x * x - v[i]);
            w[i] = w[i] * t.decay - c.rate * m[i] / (sqrtf(v[i]) * c.second + c.eps);
        }
        write4((Moment*)t.m + at, m, count);
        write4((Moment*)t.v + at, v, count);
        write4(t.master + at, w, count);
        if (t.weight) write4(t.weight + at, w, count);
    });
}

// AdamW (Loshchilov & Hutter 2019) with gradient · norm[1]; grid and chunks as in sum_squares, norm from global_norm.
// adamw_M_G: moments of type M, gradients of type G.
typedef float f32;
#define ADAMW(M, G)                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256)                                                                             \
        adamw_##M##_##G(const Trained* tensors, const int2* chunks, const float* norm, const __grid_constant__ AdamW c) {         \
        adamw<M, G>(tensors, chunks, norm, c);                                                                                    \
    }
ADAMW(f32, f32) ADAMW(f32, bf16) ADAMW(bf16, f32) ADAMW(bf16, bf16)

// sum += x. sum: [n] f32, x: [n] bf16, both 16-byte aligned. Any grid of 256 threads.
extern "C" __global__ void __launch_bounds__(256) accumulate(float* sum, const bf16* x, u64 n) {
    let_next_start();
    wait_for_previous();
    for (u64 i = ((u64)blockIdx.x * 256 + threadIdx.x) * 4; i < n; i += (u64)gridDim.x * 1024) {
        int count = (int)min(n - i, (u64)4);
        float a[4], b[4];
        read4(a, sum + i, count), read4(b, x + i, count);
        for (int j = 0; j < 4; j++) a[j] += b[j];
        write4(sum + i, a, count);
    }
}
