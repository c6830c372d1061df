// Drawing from what top-k, top-p and min-p leave, and verifying drafted tokens: a block per row of logits. The oracle is
// engine/sampler on the CPU: same truncations, same order of tokens, same random number, hence the same token.
//
// Every truncation keeps the first tokens of the ranking (select.cu), so what may be drawn is known by its last token. It is
// searched mostly among the few tokens near the top, which are listed first, else in the whole row.

// Tokens that are listed, at most.
#define LIST 8192
#define CUTS 3

// In log2: e^-2, e^-5 and e^-12 times as likely as the best; then all that have a weight, of which 2^-45 is the least.
static __device__ __forceinline__ float cut_of(int j) { return j == 0 ? 2.885f : j == 1 ? 7.213f : j == 2 ? 17.312f : 45.5f; }

// `proposed` of a row that wants a draw only, and of padding.
#define NOTHING (-1)
#define PADDING (-2)

// What a row wants (draws.rs).
struct Ask {
    const float* q;    // probabilities of the draft, [V]; null: it is certain of `proposed`
    float* dense;      // where to leave the probabilities drawn from, [V], drawing in the order of ids as drafts do; or null
    double accept;     // random number of the acceptance
    float floor;       // greatest distance that min-p leaves; infinity: off
    float top_p;       // 1: off
    int top_k;         // 0: off
    int proposed;
};

// What a chunk has within each cut, and with a weight: mass and tokens.
struct Near {
    u64 mass[CUTS + 1];
    u32 tokens[CUTS + 1];
};

// Of the proposed token.
struct Verdict {
    int accepted;
    float logprob, policy;
};

struct Draw {
    const float* logits;       // [R, V]
    const Chunk* chunks;       // [R, ⌈V / CHUNK⌉], as near
    Near* near;
    const float* temperature;  // [R]; 0: greedy
    const Ask* asks;           // [R]
    const double* uniform;     // [steps, stride], as token, logprob and policy
    int* token;
    float *logprob, *policy;
    Verdict* verdicts;         // [R]
    const int* step;
    int stride, vocab;
};

// What is known of a row before anything is drawn.
struct Known {
    Scale at;
    double log_total;
    int first;   // most likely token
    int tokens;  // that have a weight
    u64 mass;    // of all
    u32 high;    // no key with a weight is above
};

// Top-k, top-p and min-p. `s` holds all they leave.
template <class S>
static __device__ Bound truncated(const S& s, const Ask& ask, const Known& row) {
    Bound bound = {row.high, 0x7fffffff};
    u64 base = row.mass;
    if (ask.top_k > 0 && ask.top_k < row.tokens) {
        bound = ranked(s, Weight{row.at, bound, COUNT}, ask.top_k - 1, row.high);
        base = total(s, Weight{row.at, bound, MASS});
    }
    if (ask.top_p < 1.f) {
        bound = ranked(s, Weight{row.at, bound, MASS}, goal_of(base, ask.top_p) - 1, bound.key);
    }
    u32 floor = __float_as_uint(ask.floor);
    if (floor < bound.key) bound = {floor, 0x7fffffff};
    return bound;
}

static __device__ void answer(const Draw& p, int row, int at, int token, const Known& known, double log_mass) {
    if (threadIdx.x) return;
    double scaled = known.at.logprob(known.at.key(__ldcg(p.logits + (size_t)row * p.vocab + token)));
    p.token[at] = token;
    p.logprob[at] = (float)(scaled - log_mass);
    p.policy[at] = (float)(scaled - known.log_total);
}

// A token of what `weight` counts: by rank from truncated distributions, in the order of ids from others. -1: it is 0.
template <class S>
static __device__ int pick(const S& s, const Weight& weight, double u, bool by_rank) {
    if (!by_rank) return in_order(s, weight, 0, ANY, u);
    u64 all = total(s, weight);
    return all ? ranked(s, weight, part_of(all, u), weight.bound.key).id : -1;
}

// Verifies and draws. `log_mass`: of what `bound` holds.
template <class S>
static __device__ void decide(const S& s, const Draw& p, const Ask& ask, const Known& known, Bound bound, double log_mass,
                              bool by_rank, int row, int at) {
    const Scale& scale = known.at;
    Weight plain = {scale, bound, MASS};
    double u = p.uniform[at];
    if (ask.proposed < 0) return answer(p, row, at, pick(s, plain, u, by_rank), known, log_mass);
    bool real = ask.proposed < p.vocab;
    u32 key = real ? scale.key(__ldcg(p.logits + (size_t)row * p.vocab + ask.proposed)) : FARTHEST;
    double scaled = scale.logprob(key);
    double likely = bound.holds(ask.proposed, key) ? exp(scaled - log_mass) : 0.0;
    double certain = !ask.q ? 1.0 : real ? (double)ask.q[ask.proposed] : 0.0;
    bool accepted = ask.accept * certain < likely;
    if (threadIdx.x == 0)
        p.verdicts[row] = {accepted, (float)(scaled - log_mass), (float)(scaled - known.log_total)};
    if (accepted) return;
    Weight residual = {scale, bound, RESIDUAL, ask.q, ask.proposed, (float)exp(-log_mass)};
    int token = pick(s, residual, u, by_rank);
    // Nothing is left where p and q are equal but for rounding.
    if (token < 0) token = pick(s, plain, u, by_rank);
    answer(p, row, at, token, known, log_mass);
}

// A draft's row: leaves its probabilities and draws in the order of ids.
static __device__ void decide_dense(const Whole& s, const Draw& p, const Ask& ask, const Known& known, Bound bound,
                                    double log_mass, int row, int at) {
    float inverse = (float)exp(-log_mass);
    s.each(threadIdx.x, s.count, 32 * WARPS,
           [&](int id, u32 key) { ask.dense[id] = bound.holds(id, key) ? known.at.likelihood(key) * inverse : 0.f; });
    decide(s, p, ask, known, bound, log_mass, false, row, at);
}

// Greedy: one token has all the probability.
static __device__ void decide_greedy(const Draw& p, const Ask& ask, const Known& known, int row, int at) {
    if (ask.dense)
        for (int i = threadIdx.x; i < p.vocab; i += 32 * WARPS) ask.dense[i] = i == known.first ? 1.f : 0.f;
    answer(p, row, at, known.first, known, known.log_total);
    float logprob = (float)(known.at.logprob(0) - known.log_total);
    if (threadIdx.x == 0) p.verdicts[row] = {ask.proposed == known.first, logprob, logprob};
}

// What sum_chunks found, over the whole row. False: a logit is not finite.
static __device__ bool know(const Draw& p, int row, Known& known) {
    __shared__ float tops[WARPS];
    __shared__ int firsts[WARPS];
    __shared__ double sums[WARPS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = (p.vocab + CHUNK - 1) / CHUNK;
    float degree = p.temperature[row];
    known.at.scale = 1.4426950408889634f / (degree == 0.f ? 1.f : degree);
    Chunk own = {NEG_INF, 0.f, 0x7fffffff};
    if (threadIdx.x < count) own = p.chunks[(size_t)row * count + threadIdx.x];
    float top = warp_max(own.top);
    if (lane == 0) tops[warp] = top;
    __syncthreads();
    top = warp_max(tops[lane]);
    known.at.top = top;
    int first = own.top == top ? own.first : 0x7fffffff;
    double sum = threadIdx.x < count ? (double)own.sum * exp2_fast((own.top - top) * known.at.scale) : 0.0;
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        first = min(first, __shfl_xor_sync(FULL, first, o));
        sum += __shfl_xor_sync(FULL, sum, o);
    }
    if (lane == 0) firsts[warp] = first, sums[warp] = sum;
    __syncthreads();
    first = firsts[lane], sum = sums[lane];
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        first = min(first, __shfl_xor_sync(FULL, first, o));
        sum += __shfl_xor_sync(FULL, sum, o);
    }
    known.first = first;
    known.log_total = log(sum);
    return sum == sum;
}

// The nearest cut with enough tokens for the truncations, or CUTS for all, if so many can be listed, else CUTS + 1; and
// how many tokens within it come before each chunk.
static __device__ int survey(const Draw& p, int row, const Ask& ask, Known& known, int* before, int* listed) {
    __shared__ u64 sums_of[WARPS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = (p.vocab + CHUNK - 1) / CHUNK;
    Near own = {};
    if (threadIdx.x < count) own = p.near[(size_t)row * count + threadIdx.x];
    u64 sums[2 * CUTS + 2];
#pragma unroll
    for (int j = 0; j <= CUTS; j++) sums[2 * j] = own.tokens[j], sums[2 * j + 1] = own.mass[j];
    block_sums(sums);
    known.tokens = (int)sums[2 * CUTS];
    known.mass = sums[2 * CUTS + 1];
    bool counted = ask.top_k > 0 && ask.top_k < known.tokens;
    u64 goal = ask.top_p < 1.f ? goal_of(known.mass, ask.top_p) : 0, tokens = sums[2 * CUTS], mine = own.tokens[CUTS];
    int chosen = CUTS;
#pragma unroll
    for (int j = CUTS - 1; j >= 0; j--) {
        bool reached = counted         ? sums[2 * j] >= ask.top_k
                       : ask.top_p < 1.f ? sums[2 * j + 1] >= goal
                                         : ask.floor * known.at.scale <= cut_of(j);
        if (reached) chosen = j, tokens = sums[2 * j], mine = own.tokens[j];
    }
    u64 upto = mine;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        u64 other = __shfl_up_sync(FULL, upto, o);
        if (lane >= o) upto += other;
    }
    if (lane == 31) sums_of[warp] = upto;
    __syncthreads();
    u64 others = warp_sum(lane < warp ? sums_of[lane] : 0);
    before[threadIdx.x] = (int)(others + upto - mine);
    *listed = (int)tokens;
    __syncthreads();
    return tokens <= LIST ? chosen : CUTS + 1;
}

// Whether a token counts as within a cut.
static __device__ __forceinline__ bool within(const Scale& at, u32 key, int cut) {
    return cut == CUTS ? at.weight(key) > 0 : __uint_as_float(key) * at.scale <= cut_of(cut);
}

// Lists the tokens within a cut in the order of ids: a warp per chunk.
static __device__ void list(const Draw& p, int row, const Known& known, int cut, const int* before, int listed, u32* keys,
                            int* ids) {
    int lane = threadIdx.x % 32, count = (p.vocab + CHUNK - 1) / CHUNK;
    const float* x = p.logits + (size_t)row * p.vocab;
    for (int c = threadIdx.x / 32; c < count; c += WARPS) {
        int slot = before[c], end = c + 1 < count ? before[c + 1] : listed;
        if (slot == end) continue;
        float v[CHUNK / 32];
#pragma unroll
        for (int j = 0; j < CHUNK / 32; j++) {
            int i = c * CHUNK + 32 * j + lane;
            v[j] = i < p.vocab ? __ldcg(x + i) : NEG_INF;
        }
#pragma unroll
        for (int j = 0; j < CHUNK / 32; j++) {
            u32 key = known.at.key(v[j]);
            bool near = v[j] > NEG_INF && within(known.at, key, cut);
            u32 claims = __ballot_sync(FULL, near);
            if (near) {
                int place = slot + __popc(claims & ((1u << lane) - 1));
                keys[place] = key, ids[place] = c * CHUNK + 32 * j + lane;
            }
            slot += __popc(claims);
        }
    }
}

static __device__ __forceinline__ bool truncates(const Ask& ask) {
    return ask.top_k > 0 || ask.top_p < 1.f || ask.floor < __uint_as_float(FARTHEST);
}

// Finds out what is near the top, for truncated rows. One warp per chunk and row; arguments as `draw`'s. Grid:
// (⌈chunks / 8⌉, R), 8 warps.
extern "C" __global__ void __launch_bounds__(256) survey_chunks(const __grid_constant__ Draw p) {
    int count = (p.vocab + CHUNK - 1) / CHUNK;
    int row = blockIdx.y, c = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    let_next_start();
    wait_for_previous();
    Ask ask = p.asks[row];
    float degree = p.temperature[row], top = NEG_INF;
    if (c >= count || ask.proposed == PADDING || degree == 0.f || !truncates(ask)) return;
    for (int i = lane; i < count; i += 32) top = fmaxf(top, p.chunks[(size_t)row * count + i].top);
    Scale at = {warp_max(top), 1.4426950408889634f / degree};
    const float* x = p.logits + (size_t)row * p.vocab;
    float v[CHUNK / 32];
#pragma unroll
    for (int j = 0; j < CHUNK / 32; j++) {
        int i = c * CHUNK + 32 * j + lane;
        v[j] = i < p.vocab ? __ldcg(x + i) : NEG_INF;
    }
    // Sixteen bits for each count, of which the largest is 512.
    u64 mass[CUTS + 1] = {}, tokens = 0;
#pragma unroll
    for (int j = 0; j < CHUNK / 32; j++) {
        if (!(v[j] > NEG_INF)) continue;
        u32 key = at.key(v[j]);
        u64 w = at.weight(key);
#pragma unroll
        for (int cut = 0; cut <= CUTS; cut++)
            if (within(at, key, cut)) mass[cut] += w, tokens += (u64)1 << (16 * cut);
    }
    tokens = warp_sum(tokens);
    Near found;
#pragma unroll
    for (int cut = 0; cut <= CUTS; cut++) {
        found.mass[cut] = warp_sum(mass[cut]);
        found.tokens[cut] = (u32)(tokens >> (16 * cut)) & 0xffff;
    }
    if (lane == 0) p.near[(size_t)row * count + c] = found;
}

// See the file header. Grid: (R), 32 warps; dynamic shared memory: LIST keys and ids. A logit that is not finite makes
// the log-probs NaN.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) draw(const __grid_constant__ Draw p) {
    extern __shared__ u32 room[];
    __shared__ int before[32 * WARPS];
    int row = blockIdx.x, listed = 0;
    let_next_start();
    wait_for_previous();
    Ask ask = p.asks[row];
    if (ask.proposed == PADDING) return;
    int at = *p.step * p.stride + row;
    Known known;
    if (!know(p, row, known)) {
        float bad = __uint_as_float(0x7fc00000u);
        if (threadIdx.x == 0) p.token[at] = 0, p.logprob[at] = p.policy[at] = bad, p.verdicts[row] = {0, bad, bad};
        return;
    }
    if (p.temperature[row] == 0.f) return decide_greedy(p, ask, known, row, at);
    Whole whole = {p.logits + (size_t)row * p.vocab, p.vocab, known.at};
    Bound bound = {FARTHEST, 0x7fffffff};
    if (!truncates(ask)) {
        if (ask.dense) return decide_dense(whole, p, ask, known, bound, known.log_total, row, at);
        return decide(whole, p, ask, known, bound, known.log_total, false, row, at);
    }
    int cut = survey(p, row, ask, known, before, &listed);
    // A few bits more, for what is rounded here.
    known.high = min(FARTHEST, __float_as_uint(cut_of(cut) / known.at.scale) + 16);
    if (cut > CUTS) {
        bound = truncated(whole, ask, known);
        double log_mass = log((double)total(whole, Weight{known.at, bound, MASS}) / (double)ONE);
        if (ask.dense) return decide_dense(whole, p, ask, known, bound, log_mass, row, at);
        return decide(whole, p, ask, known, bound, log_mass, true, row, at);
    }
    Listed near = {room, (int*)room + LIST, listed};
    list(p, row, known, cut, before, listed, room, (int*)room + LIST);
    __syncthreads();
    bound = truncated(near, ask, known);
    double log_mass = log((double)total(near, Weight{known.at, bound, MASS}) / (double)ONE);
    if (ask.dense) return decide_dense(whole, p, ask, known, bound, log_mass, row, at);
    decide(near, p, ask, known, bound, log_mass, true, row, at);
}
