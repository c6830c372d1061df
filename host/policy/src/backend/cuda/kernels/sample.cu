// Drawing a token from logits with one pass over them, and getting ready for the next step on the device.

#define CHUNK 512
// Chunks that a lane has of a row: vocabularies up to 320 thousand.
#define RUN 20

// Drawing has two kernels: the first goes over the logits and is divided as finely as fills the GPU, the second, a warp
// per row, sees only what the first found in each chunk.

// What a chunk of a row holds: largest logit, its lowest id, and the sum of exp((logit - largest) / temperature), NaN
// where a logit is not finite.
struct Chunk {
    float top, sum;
    int first;
};

// One warp per chunk and row. logits: [R, V]; temperature: [R]; chunks: [R, ⌈V / CHUNK⌉]. Grid: (⌈chunks / 8⌉, R), 8 warps.
extern "C" __global__ void __launch_bounds__(256) sum_chunks(const float* logits, const float* temperature, Chunk* chunks,
                                                             int vocab) {
    int count = (vocab + CHUNK - 1) / CHUNK;
    int row = blockIdx.y, c = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    let_next_start();
    wait_for_previous();
    if (c >= count) return;
    const float* x = logits + (size_t)row * vocab;
    float degree = temperature[row];
    float scale = 1.4426950408889634f / (degree == 0.f ? 1.f : degree);
    float v[CHUNK / 32];
    float top = NEG_INF;
    int first = 0x7fffffff;
    bool bad = false;
#pragma unroll
    for (int k = 0; k < CHUNK / 32; k++) {
        int i = c * CHUNK + k * 32 + lane;
        v[k] = i < vocab ? __ldcs(x + i) : NEG_INF;
    }
#pragma unroll
    for (int k = 0; k < CHUNK / 32; k++) {
        int i = c * CHUNK + k * 32 + lane;
        bad |= i < vocab && !(fabsf(v[k]) < __uint_as_float(0x7f800000u));
        if (v[k] > top) top = v[k], first = i;
    }
    float most = warp_max(top);
    int candidate = top == most ? first : 0x7fffffff;
#pragma unroll
    for (int o = 16; o; o >>= 1) candidate = min(candidate, __shfl_xor_sync(FULL, candidate, o));
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < CHUNK / 32; k++) sum += exp2_fast((v[k] - most) * scale);
    sum = warp_sum(sum);
    if (__any_sync(FULL, bad)) sum = __uint_as_float(0x7fc00000u);
    if (lane == 0) chunks[(size_t)row * count + c] = {most, sum, candidate};
}

// Softmax at the row's temperature and the token at `uniform` of its cumulated mass, in the order of the vocabulary,
// as on the CPU (engine/sampler): the same random number gives the same token. Temperature 0: the most likely token of
// lowest id, log-prob at temperature 1. One warp per row. logits: [R, V]; temperature, uniform: [R]; token, logprob: [R].
// A logit that is not finite makes the log-prob NaN. `uniform`, `token` and `logprob` are of step *step: those of step n
// stand `n · stride` further on.
extern "C" __global__ void __launch_bounds__(32) sample(const float* logits, const Chunk* chunks, const float* temperature,
                                                        const double* uniform, int* token, float* logprob,
                                                        const int* step, int stride, int vocab) {
    int count = (vocab + CHUNK - 1) / CHUNK;
    int row = blockIdx.x, lane = threadIdx.x;
    let_next_start();
    wait_for_previous();
    int at = *step * stride + row;
    const float* x = logits + (size_t)row * vocab;
    const Chunk* mine = chunks + (size_t)row * count;
    float degree = temperature[row];
    bool greedy = degree == 0.f;
    float scale = 1.4426950408889634f / (greedy ? 1.f : degree);
    // Each lane has a run of neighbouring chunks; the masses before it come from a scan over the lanes.
    int run = (count + 31) / 32, from = min(count, lane * run), to = min(count, from + run);
    Chunk own[RUN];
    float top = NEG_INF;
#pragma unroll
    for (int j = 0; j < RUN; j++)
        if (from + j < to) own[j] = mine[from + j];
#pragma unroll
    for (int j = 0; j < RUN; j++)
        if (from + j < to) top = fmaxf(top, own[j].top);
    top = warp_max(top);
    int first = 0x7fffffff;
    double mass = 0.0;
#pragma unroll
    for (int j = 0; j < RUN; j++)
        if (from + j < to) {
            if (own[j].top == top) first = min(first, own[j].first);
            own[j].sum *= exp2_fast((own[j].top - top) * scale);
            mass += (double)own[j].sum;
        }
#pragma unroll
    for (int o = 16; o; o >>= 1) first = min(first, __shfl_xor_sync(FULL, first, o));
    double upto = mass;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        double other = __shfl_up_sync(FULL, upto, o);
        if (lane >= o) upto += other;
    }
    double total = __shfl_sync(FULL, upto, 31), low = upto - mass;
    int picked = first;
    if (!greedy) {
        double target = uniform[at] * total;
        bool here = target >= low && target < upto && from < to;
        // Rounding may leave a gap: then the last lane that has chunks.
        u32 claims = __ballot_sync(FULL, here), any = __ballot_sync(FULL, from < to);
        int owner = claims ? __ffs(claims) - 1 : 31 - __clz(any), chosen = from;
        bool passed = true;
#pragma unroll
        for (int j = 0; j < RUN; j++) {
            // The last chunk of the run takes what rounding leaves.
            if (from + j + 1 < to && passed && target >= low + (double)own[j].sum) {
                low += (double)own[j].sum;
                chosen++;
            } else {
                passed = false;
            }
        }
        chosen = __shfl_sync(FULL, chosen, owner);
        double before = __shfl_sync(FULL, low, owner);
        // Sixteen neighbours a lane.
        float part[CHUNK / 32];
        int start = chosen * CHUNK + lane * (CHUNK / 32);
        mass = 0.0;
#pragma unroll
        for (int k = 0; k < CHUNK / 32; k++) {
            part[k] = start + k < vocab ? exp2_fast((x[start + k] - top) * scale) : 0.f;
            mass += (double)part[k];
        }
        upto = mass;
#pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            double other = __shfl_up_sync(FULL, upto, o);
            if (lane >= o) upto += other;
        }
        low = before + upto - mass;
        int found = -1;
#pragma unroll
        for (int k = 0; k < CHUNK / 32; k++) {
            low += (double)part[k];
            if (found < 0 && target < low && part[k] > 0.f) found = start + k;
        }
        claims = __ballot_sync(FULL, found >= 0);
        // Rounding: the most likely token of the chunk, which is one that may be drawn.
        picked = claims ? __shfl_sync(FULL, found, __ffs(claims) - 1) : mine[chosen].first;
    }
    if (lane == 0) {
        token[at] = picked;
        // A NaN has spread from its chunk's sum to the total.
        logprob[at] = (float)((double)((x[picked] - top) * scale) * 0.6931471805599453 - log(total));
    }
}

// The next decoding step: each token becomes an input. One thread per row; the thread of row 0 counts the step. A row
// that has drawn the tokens it has room for (`left`) becomes padding.
extern "C" __global__ void advance(int* ids, int* positions, int* kv_len, int* left, const int* token, int* step,
                                   int stride, int rows) {
    int row = threadIdx.x;
    let_next_start();
    wait_for_previous();
    int now = *step;
    __syncthreads();
    if (row == 0) *step = now + 1;
    if (row >= rows || positions[row] < 0) return;
    if (--left[row] <= 0) {
        positions[row] = -1;
        kv_len[row] = 0;
        return;
    }
    ids[row] = token[now * stride + row];
    positions[row] += 1;
    kv_len[row] += 1;
}
