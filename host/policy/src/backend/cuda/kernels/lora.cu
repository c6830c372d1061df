// Adapters merged into the weights that everything reads, and rows of a gradient that the forward pass has made.

// to[r] = scale[r] · from[r], r a block of 256 threads. from, to: [grid, H] bf16, H a multiple of 2; scale: [grid].
extern "C" __global__ void __launch_bounds__(256) scale_rows(const u32* from, const float* scale, u32* to, int hidden) {
    let_next_start();
    wait_for_previous();
    size_t row = (size_t)blockIdx.x * (hidden / 2);
    float s = scale[blockIdx.x];
    for (int i = threadIdx.x; i < hidden / 2; i += 256) {
        u32 x = from[row + i];
        to[row + i] = pack(s * low(x), s * high(x));
    }
}

// Where an element of a matrix rounds up: a hash of its index (Wellons' lowbias32), the same in every step and process.
static __device__ __forceinline__ u32 threshold(u64 i) {
    u32 x = (u32)i ^ (u32)(i >> 32) * 0x9e3779b9u;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

// merged = base + update as bf16, rounded up or down by chance, each number with the chance that makes the mean right but
// always with the same luck. Rounded to nearest, an update below half a step of bf16 would be lost on all numbers alike, and
// an adapter would change nothing until it is large. Without an update merged is base. base, merged: [n] bf16; update: [n]
// f32; `first` is the index of the first number in its matrix. Any grid of 256 threads.
extern "C" __global__ void __launch_bounds__(256) merge_adapter(const bf16* base, const float* update, bf16* merged, u64 first,
                                                                u64 n) {
    let_next_start();
    wait_for_previous();
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < n; i += (u64)gridDim.x * 256) {
        u32 sum = __float_as_uint(to_f32(base[i]) + update[i]);
        merged[i] = (bf16)((sum + (threshold(first + i) & 0xffffu)) >> 16);
    }
}
