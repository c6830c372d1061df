// The optimizer: all tensors in one launch, from a table of them and a table of their chunks.

// Numbers of a chunk; a block of 256 threads takes one.
#define CHUNK 16384

// A trainable tensor. 16-byte aligned throughout.
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

// Sum of squares of each chunk of gradients. chunks: [grid] tensor, chunk of the tensor; part: [grid] f64. `bf16` for bf16 gradients.
extern "C" __global__ void __launch_bounds__(256) sum_squares(const Trained* tensors, const int2* chunks, double* part) {}
extern "C" __global__ void __launch_bounds__(256) sum_squares_bf16(const Trained* tensors, const int2* chunks, double* part) {}

// norm[0] = √Σ part · scale, the global 2-norm of scale · gradient; norm[1] = scale · clip, clip = max_norm / (norm + 1e-6) where
// the norm exceeds max_norm > 0, else 1; norm[1] is NaN when the norm is not finite, and `adamw` then changes nothing.
// part: [n]; norm: [2] f32. One block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) global_norm(const double* part, float* norm, int n, float scale, float max_norm) {}

// AdamW (Loshchilov & Hutter 2019) with gradient · norm[1]; grid and chunks as in sum_squares.
// adamw_M_G: moments of type M, gradients of type G.
#define ADAMW(M, G)                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256)                                                                             \
        adamw_##M##_##G(const Trained* tensors, const int2* chunks, const float* norm, const __grid_constant__ AdamW c) {}
ADAMW(f32, f32) ADAMW(f32, bf16) ADAMW(bf16, f32) ADAMW(bf16, bf16)

// sum += x. sum: [n] f32, x: [n] bf16, both 16-byte aligned. Any grid of 256 threads.
extern "C" __global__ void __launch_bounds__(256) accumulate(float* sum, const bf16* x, u64 n) {}
