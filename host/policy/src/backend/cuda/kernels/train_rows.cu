// Row-wise operations of training and their gradients. Sums over rows are made in two stages of fixed order: every block leaves
// its part, and `sum_parts` adds the parts up. The parts of a sum depend on the grid alone, so the same grid gives the same bits.

// RMSNorm (Zhang & Sennrich 2019) with what its gradient needs: y = x + delta, out = y · rstd · weight, rstd = 1/√(mean(y²) + eps).
// x: [T, H] f32, in place; delta: [T, H] or null; weight: [H]; rows: the rows of x to take, [grid], or null for all in order
// (delta with rows is refused by nobody and means nothing); saved: [grid, H] bf16 copy of y, or null; out: [grid, H];
// rstd: [grid]. One block of 256 threads per row; H a multiple of 4, at most 1024·N for rms_norm_save_N, N = 1, 2, 4, 8.
#define RMS_NORM(N)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                            \
        rms_norm_save_##N(float* x, const bf16* delta, const float* weight, const int* rows, bf16* saved, bf16* out,             \
                          float* rstd, int hidden, float eps) {}
RMS_NORM(1) RMS_NORM(2) RMS_NORM(4) RMS_NORM(8)

// out = saved · rstd · weight: the norm's output again, for a pass that did not keep it. Shapes and grid as above.
extern "C" __global__ void __launch_bounds__(256) rms_norm_again(const bf16* saved, const float* rstd, const float* weight,
                                                                 bf16* out, int hidden) {}

// Gradient of the norm: with n = saved · rstd, dx (+)= rstd · (weight · dout − n · mean(weight · dout · n)); part = Σ dout · n.
// saved, dout: [rows, H] bf16; rstd: [rows]; dx: [rows, H] f32, added to where `add`, else written; dx16: the result as bf16,
// or null; part: [grid, H] f32 or null. Grid: any number of blocks of 256 threads; block b takes rows b, b + grid, ….
// H as in rms_norm_save_N.
#define RMS_NORM_BACKWARD(N)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                                                            \
        rms_norm_backward_##N(const bf16* saved, const float* rstd, const float* weight, const bf16* dout, float* dx,            \
                              bf16* dx16, float* part, int rows, int hidden, int add) {}
RMS_NORM_BACKWARD(1) RMS_NORM_BACKWARD(2) RMS_NORM_BACKWARD(4) RMS_NORM_BACKWARD(8)

// to[c] (+)= Σ parts[i][c], i in order. parts: [n, cols] f32, to: [cols] f32, added to where `add`. Grid: ⌈cols / 32⌉ blocks of 256
// threads.
extern "C" __global__ void __launch_bounds__(256) sum_parts(const float* parts, float* to, int n, int cols, int add) {}

// Column sums of a matrix, first stage: part[b][c] = Σ x[r][c] over the rows r of block b. x: [rows, stride] bf16, of which cols
// columns count (stride and cols multiples of 8); part: [gridDim.y, cols]. Grid: (⌈cols / 256⌉, parts), 256 threads.
extern "C" __global__ void __launch_bounds__(256) column_sums(const bf16* x, float* part, int rows, int cols, int stride) {}

// Gradient of out = silu(gate) · up. gate_up: [T, 2F], gate first; dact: [T, F]; dgate_up: [T, 2F], may be gate_up itself;
// act: [T, F], silu(gate) · up again for the weight gradient of what follows, or null. `eighth` is F / 8.
// Grid: (⌈F / 8 / 256⌉, T), 256 threads.
extern "C" __global__ void __launch_bounds__(256) swiglu_backward(const uint4* gate_up, const uint4* dact, uint4* dgate_up,
                                                                  uint4* act, int eighth) {}

// The fused projection on its way to attention, and the gradient on its way back.
struct TrainProjection {
    const bf16* qkv;                              // [T, (Q + 2K)·D] as the product left it
    const float *bias, *q_norm, *k_norm, *rope;   // [(Q + 2K)·D], [D], [D] or null; [positions, D]: D/2 cosines, D/2 sines
    const int* positions;                         // [T]
    int tokens, q_heads, kv_heads, dim;           // dim: 32, 64, 96 or 128
    float eps;
};

// Bias, norm of the head (Qwen3), rotation (Su et al. 2021). to: [T, (Q + 2K)·D], may be p.qkv; with q_norm the gradient needs
// p.qkv untouched, so then it should not be. Grid: any number of blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) qkv_rope(const __grid_constant__ TrainProjection p, bf16* to) {}

// The gradient of that. dqkv: [T, (Q + 2K)·D], holds the gradient of rotated queries in its first Q·D columns, and all columns
// of the gradient of the product (before the bias) afterwards; dkv: [splits, T, 2K·D] from attend_dkv, summed in order.
// The bias' gradient is the column sums of dqkv. qkv_rope_backward_normed also leaves part: [grid, 2·D], gradients of q_norm and
// k_norm. Grid: any number of blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256) qkv_rope_backward(const __grid_constant__ TrainProjection p, bf16* dqkv,
                                                                    const float* dkv, int splits) {}
extern "C" __global__ void __launch_bounds__(256) qkv_rope_backward_normed(const __grid_constant__ TrainProjection p, bf16* dqkv,
                                                                           const float* dkv, int splits, float* part) {}

// Rows of a gradient summed by where they belong: to[ids[b]] += Σ from[rows[i]], i from starts[b] to starts[b + 1], in an order
// that depends on the list alone. ids: [lists], distinct; starts: [lists + 1]; rows: indices into from; H a multiple of 4.
// Embedding: ids are tokens, to the table's gradient; scored tokens: ids are tokens of T, to the gradient of the last hidden
// states. Grid: (⌈H / 128⌉, lists), 256 threads.
extern "C" __global__ void __launch_bounds__(256) scatter_rows(const int* ids, const int* starts, const int* rows,
                                                               const float* from, float* to, int hidden) {}
