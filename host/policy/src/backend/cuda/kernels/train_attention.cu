// Attention for training: packed sequences, forward and backward (FlashAttention-2, Dao 2023), without atomics.
//
// A sequence is a range of tokens that sees itself causally and, before that, all tokens of a prefix range (prefix_len 0: none),
// which several sequences may share. Whoever shares a prefix follows it in T without a gap, in any order, so that the queries
// that see a key are one range of tokens too: those from the key on, up to the end of its sequence, or of the last sequence
// that has it in its prefix.
//
// The tables of tiles are the host's. Blocks start in their order, so tiles with much work belong first.

// Query tokens of a tile of `attend` and `attend_dq`, keys of a tile of `attend_dkv`, for heads of any size.
#define TILE 128

struct TrainAttention {
    const bf16* qkv;          // [T, (Q + 2K)·D] after bias, norm and rotation: queries, keys, values
    const int4* sequences;    // [S] first token, tokens, first token of the prefix, tokens of the prefix
    const int2* query_tiles;  // [query tiles] sequence, first token of the tile within the sequence (a multiple of TILE)
    const int4* key_tiles;    // [key tiles] first key, keys (≤ TILE, of one sequence), end of the tokens that see them, 0
    bf16* out;                // [T, Q·D]
    float* lse;               // [Q, T] natural log of the sum of exponentials of the scaled scores
    const bf16* dout;         // [T, Q·D]
    float* delta;             // [Q, T] dout · out of a token and head; attend_dq writes it, attend_dkv reads it
    bf16* dqkv;               // [T, (Q + 2K)·D]; attend_dq writes the first Q·D columns
    float* dkv;               // [splits, T, 2K·D]: keys, then values; attend_dkv writes all of it
    int tokens, q_heads, kv_heads;
    int splits;               // parts that the query heads of a key head are divided into, 1 to Q / K; for small T
    float scale;              // 1/√D
};

// For D = 32, 64, 96, 128, each with its dynamic shared memory as ATTEND_SHARED_D and so on below:
//   attend_D      out and lse. Grid (Q, query tiles), 128 threads.
//   attend_dq_D   delta and dqkv's queries, from out, lse and dout. Grid (Q, query tiles), 128 threads.
//   attend_dkv_D  dkv, after attend_dq_D. Grid (K · splits, key tiles), 128 threads for D ≤ 64 and 256 above.
// Dynamic shared bytes: attend 128·D·2 + 4·64·D·2 (= 768·D), attend_dq 2·128·D·2 + 4·64·D·2 (= 1024·D),
// attend_dkv 2·128·D·2 + 4·64·D·2 + 1024 (= 1024·D + 1024).
#define KERNELS(D, WARPS)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(128) attend_##D(const __grid_constant__ TrainAttention p) {}                    \
    extern "C" __global__ void __launch_bounds__(128) attend_dq_##D(const __grid_constant__ TrainAttention p) {}                 \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) attend_dkv_##D(const __grid_constant__ TrainAttention p) {}
KERNELS(32, 4)
KERNELS(64, 4)
KERNELS(96, 8)
KERNELS(128, 8)
