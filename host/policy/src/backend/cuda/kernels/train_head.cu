// Log-probs, entropies and gradients of a chunk of logits. Logits are f32, because a bf16 logit near 20 is off by up to 0.06,
// which is a log-prob's error. Rows are `stride` numbers apart, a multiple of 8, so that they are aligned for any vocabulary;
// what is beyond the vocabulary is never read as a logit. One block of 512 threads per row; temperature > 0.
// With z = logits / temperature and p = softmax(z): logp = z[target] − lse, entropy = lse − Σ p·z.

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f
#define THREADS 512

// Sum or largest over a block; the same bits in each thread.
template <typename Combine>
static __device__ __forceinline__ float over_block(float x, float* part, Combine combine) {
    for (int o = 16; o; o >>= 1) x = combine(x, __shfl_xor_sync(FULL, x, o));
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    x = part[0];
    for (int i = 1; i < THREADS / 32; i++) x = combine(x, part[i]);
    return x;
}
static __device__ __forceinline__ float block_sum(float x, float* part) {
    return over_block(x, part, [](float a, float b) { return a + b; });
}
static __device__ __forceinline__ float block_max(float x, float* part) {
    return over_block(x, part, [](float a, float b) { return fmaxf(a, b); });
}

// Running Σ 2ᵈ and Σ 2ᵈ·d over d = x − top, x: logits in powers of two.
struct Exponentials {
    // Finite, so that what has seen nothing can be rescaled.
    float top = -1e30f, sum = 0.f, weighted = 0.f;

    __device__ __forceinline__ void raise(float to) {
        float by = exp2_fast(top - to);
        weighted = by * (weighted + sum * (top - to));
        sum *= by;
        top = to;
    }
    template <int N>
    __device__ __forceinline__ void add(const float x[N]) {
        float most = top;
#pragma unroll
        for (int i = 0; i < N; i++) most = fmaxf(most, x[i]);
        if (most > top) raise(most);
#pragma unroll
        for (int i = 0; i < N; i++) {
            float d = x[i] - top, e = exp2_fast(d);
            sum += e;
            weighted += e * d;
        }
    }
    // Of the whole row, in every thread. scale: log2(e) / temperature.
    __device__ __forceinline__ void of_row(const float* row, int vocab, float scale, float* part) {
        int whole = vocab / 4, i = threadIdx.x;
        for (; i + 3 * THREADS < whole; i += 4 * THREADS) {
            float x[16];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint4 v = load16((const float4*)row + i + j * THREADS);
                x[4 * j] = __uint_as_float(v.x) * scale, x[4 * j + 1] = __uint_as_float(v.y) * scale;
                x[4 * j + 2] = __uint_as_float(v.z) * scale, x[4 * j + 3] = __uint_as_float(v.w) * scale;
            }
            add<16>(x);
        }
        for (; i < whole; i += THREADS) {
            float4 v = ((const float4*)row)[i];
            float x[4] = {v.x * scale, v.y * scale, v.z * scale, v.w * scale};
            add<4>(x);
        }
        if (threadIdx.x < vocab % 4) {
            float x[1] = {row[whole * 4 + threadIdx.x] * scale};
            add<1>(x);
        }
        raise(block_max(top, part));
        sum = block_sum(sum, part);
        weighted = block_sum(weighted, part);
    }
    __device__ __forceinline__ float log_sum() const { return top * LN_2 + logf(sum); }
};

// logits: [n, stride]; targets: [n]; logp, entropy, lse: [n]. Grid: n. One pass over the logits.
extern "C" __global__ void __launch_bounds__(THREADS) score_logits(const float* logits, const int* targets, float* logp,
                                                                   float* entropy, float* lse, int vocab, int stride,
                                                                   float inverse_temperature) {
    __shared__ float part[THREADS / 32];
    let_next_start();
    wait_for_previous();
    const float* row = logits + (size_t)blockIdx.x * stride;
    Exponentials e;
    e.of_row(row, vocab, inverse_temperature * LOG2_E, part);
    if (threadIdx.x) return;
    float log_sum = e.log_sum();
    logp[blockIdx.x] = row[targets[blockIdx.x]] * inverse_temperature - log_sum;
    entropy[blockIdx.x] = fmaxf(logf(e.sum) - e.weighted / e.sum * LN_2, 0.f);
    lse[blockIdx.x] = log_sum;
}

// Calls gradient(z, j), j the place in the vocabulary, for each logit over the temperature, and leaves what it gives as bf16.
template <typename Gradient>
static __device__ __forceinline__ void replace_row(const float* row, bf16* to, int vocab, int stride, float inverse_temperature,
                                                   Gradient gradient) {
#pragma unroll 2
    for (int i = threadIdx.x; i < stride / 8; i += THREADS) {
        uint4 a = load16((const uint4*)row + 2 * i), b = load16((const uint4*)row + 2 * i + 1);
        u32 x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        float d[8];
#pragma unroll
        for (int j = 0; j < 8; j++)
            d[j] = 8 * i + j < vocab ? gradient(__uint_as_float(x[j]) * inverse_temperature, 8 * i + j) : 0.f;
        ((uint4*)to)[i] = make_uint4(pack(d[0], d[1]), pack(d[2], d[3]), pack(d[4], d[5]), pack(d[6], d[7]));
    }
}

// dlogits[i][j] = (coef[i] · (1[j = target] − p_j) − entropy_coef[i] · p_j · (log p_j + entropy[i])) / temperature: the gradient
// of coef · logp + entropy_coef · entropy. lse, entropy: from score_logits; coef: [n]; entropy_coef: [n] or null;
// dlogits: [n, stride] bf16, zeros beyond the vocabulary. Grid: n. One pass.
extern "C" __global__ void __launch_bounds__(THREADS) logits_gradient(const float* logits, const int* targets, const float* lse,
                                                                      const float* entropy, const float* coef,
                                                                      const float* entropy_coef, bf16* dlogits, int vocab,
                                                                      int stride, float inverse_temperature) {
    let_next_start();
    wait_for_previous();
    int i = blockIdx.x, target = targets[i];
    const float* row = logits + (size_t)i * stride;
    bf16* to = dlogits + (size_t)i * stride;
    float log_sum = lse[i], c = coef[i] * inverse_temperature;
    if (entropy_coef) {
        float e = entropy_coef[i] * inverse_temperature, h = entropy[i];
        replace_row(row, to, vocab, stride, inverse_temperature, [&](float z, int j) {
            float log_p = z - log_sum, p = exp2_fast(log_p * LOG2_E);
            return (j == target ? c : 0.f) - p * (c + e * (log_p + h));
        });
    } else {
        replace_row(row, to, vocab, stride, inverse_temperature, [&](float z, int j) {
            return (j == target ? c : 0.f) - c * exp2_fast((z - log_sum) * LOG2_E);
        });
    }
}

// Cross-entropy from soft targets q (distillation; Hinton et al. 2015) and its gradient: loss[i] = Σ q·(lse − z),
// dlogits[i][j] = weight[i] · (p_j − q_j) / temperature. ids, probs: [n, k], a row's ids distinct and an id of −1 the end of its
// list; probs are renormalised to sum 1; a list without ids, or of sum 0, has loss 0 and gradient 0. weight, loss: [n];
// dlogits: [n, stride] bf16. Grid: n. Reads the logits twice.
extern "C" __global__ void __launch_bounds__(THREADS) distill_gradient(const float* logits, const int* ids, const float* probs,
                                                                       const float* weight, float* loss, bf16* dlogits, int k,
                                                                       int vocab, int stride, float inverse_temperature) {
    __shared__ float part[THREADS / 32];
    __shared__ int count;
    let_next_start();
    wait_for_previous();
    int i = blockIdx.x;
    const float* row = logits + (size_t)i * stride;
    bf16* to = dlogits + (size_t)i * stride;
    ids += (size_t)i * k, probs += (size_t)i * k;
    if (threadIdx.x == 0) {
        int n = 0;
        while (n < k && ids[n] >= 0) n++;
        count = n;
    }
    Exponentials e;
    e.of_row(row, vocab, inverse_temperature * LOG2_E, part);
    float log_sum = e.log_sum(), total = 0.f, sum = 0.f;
    for (int j = threadIdx.x; j < count; j += THREADS) {
        total += probs[j];
        sum += probs[j] * (log_sum - row[ids[j]] * inverse_temperature);
    }
    total = block_sum(total, part), sum = block_sum(sum, part);
    float share = total > 0.f ? 1.f / total : 0.f;
    if (threadIdx.x == 0) loss[i] = sum * share;
    float c = total > 0.f ? weight[i] * inverse_temperature : 0.f;
    auto p = [&](float z) { return exp2_fast((z - log_sum) * LOG2_E); };
    replace_row(row, to, vocab, stride, inverse_temperature, [&](float z, int) { return c * p(z); });
    __syncthreads();
    for (int j = threadIdx.x; j < count; j += THREADS)
        to[ids[j]] = to_bf16(c * (p(row[ids[j]] * inverse_temperature) - probs[j] * share));
}
