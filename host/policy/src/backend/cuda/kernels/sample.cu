// Drawing a token from logits with one pass over them, and getting ready for the next step on the device.

#define CHUNK 512

// Softmax at the row's temperature and the token at `uniform` of its cumulated mass, in the order of the vocabulary,
// as on the CPU (engine/sampler): the same random number gives the same token. Temperature 0: the most likely token of
// lowest id, log-prob at temperature 1. One block of 32 warps per row. logits: [R, V]; temperature, uniform: [R];
// token, logprob: [R]. A logit that is not finite makes the log-prob NaN. `uniform`, `token` and `logprob` are of step
// *step: those of step n stand `n · stride` further on.
extern "C" __global__ void __launch_bounds__(1024) sample(const float* logits, const float* temperature,
                                                          const double* uniform, int* token, float* logprob,
                                                          const int* step, int stride, int vocab) {
    extern __shared__ float shared[];
    int chunks = (vocab + CHUNK - 1) / CHUNK;
    float* tops = shared;
    float* sums = tops + chunks;
    int* firsts = (int*)(sums + chunks);
    __shared__ float best;
    __shared__ double total, before;
    __shared__ int chosen;
    int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int at = *step * stride + row;
    const float* x = logits + (size_t)row * vocab;
    float degree = temperature[row];
    bool greedy = degree == 0.f;
    float scale = 1.4426950408889634f / (greedy ? 1.f : degree);
    for (int c = warp; c < chunks; c += 32) {
        float v[CHUNK / 32];
        float top = NEG_INF;
        int first = 0x7fffffff;
        bool bad = false;
#pragma unroll
        for (int k = 0; k < CHUNK / 32; k++) {
            int i = c * CHUNK + k * 32 + lane;
            v[k] = i < vocab ? x[i] : NEG_INF;
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
        if (lane == 0) tops[c] = most, sums[c] = sum, firsts[c] = candidate;
    }
    __syncthreads();
    if (warp == 0) {
        float top = NEG_INF;
        for (int c = lane; c < chunks; c += 32) top = fmaxf(top, tops[c]);
        top = warp_max(top);
        int first = 0x7fffffff;
        for (int c = lane; c < chunks; c += 32)
            if (tops[c] == top) first = min(first, firsts[c]);
#pragma unroll
        for (int o = 16; o; o >>= 1) first = min(first, __shfl_xor_sync(FULL, first, o));
        // Each lane has a run of neighbouring chunks; the masses before it come from a scan over the lanes.
        int run = (chunks + 31) / 32, from = lane * run, to = min(chunks, from + run);
        double mine = 0.0;
        for (int c = from; c < to; c++) mine += (double)(sums[c] * exp2_fast((tops[c] - top) * scale));
        double upto = mine;
#pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            double other = __shfl_up_sync(FULL, upto, o);
            if (lane >= o) upto += other;
        }
        double all = __shfl_sync(FULL, upto, 31), target = uniform[at] * all, low = upto - mine;
        bool here = target >= low && (target < upto || lane == 31) && from < chunks;
        // Rounding may leave a gap between two lanes, or the last lane without chunks: the last lane with any.
        u32 claims = __ballot_sync(FULL, here), any = __ballot_sync(FULL, from < chunks);
        int owner = claims ? __ffs(claims) - 1 : 31 - __clz(any);
        if (lane == owner) {
            int c = from;
            for (; c + 1 < to; c++) {
                double mass = (double)(sums[c] * exp2_fast((tops[c] - top) * scale));
                if (target < low + mass) break;
                low += mass;
            }
            chosen = c;
            before = low;
        }
        if (lane == 0) {
            best = top;
            total = all;
            if (greedy) chosen = -1 - first;
        }
    }
    __syncthreads();
    if (warp != 0) return;
    float top = best;
    int picked;
    if (chosen < 0) {
        picked = -1 - chosen;
    } else {
        // Sixteen neighbours a lane.
        double target = uniform[at] * total, mine = 0.0;
        int from = chosen * CHUNK + lane * (CHUNK / 32);
        float mass[CHUNK / 32];
#pragma unroll
        for (int k = 0; k < CHUNK / 32; k++) {
            int i = from + k;
            mass[k] = i < vocab ? exp2_fast((x[i] - top) * scale) : 0.f;
            mine += (double)mass[k];
        }
        double upto = mine;
#pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            double other = __shfl_up_sync(FULL, upto, o);
            if (lane >= o) upto += other;
        }
        double low = before + upto - mine;
        int found = -1;
#pragma unroll
        for (int k = 0; k < CHUNK / 32; k++) {
            low += (double)mass[k];
            if (found < 0 && target < low && mass[k] > 0.f) found = from + k;
        }
        u32 claims = __ballot_sync(FULL, found >= 0);
        // Rounding: the most likely token of the chunk, which is one that may be drawn.
        picked = claims ? __shfl_sync(FULL, found, __ffs(claims) - 1) : firsts[chosen];
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
