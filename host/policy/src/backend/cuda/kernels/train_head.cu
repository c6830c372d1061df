// Log-probs, entropies and gradients of a chunk of logits. Logits are f32, because a bf16 logit near 20 is off by up to 0.06,
// which is a log-prob's error. Rows are `stride` numbers apart, a multiple of 8, so that they are aligned for any vocabulary.
// One block of 512 threads per row. With z = logits / temperature: logp = z[target] − lse, entropy = lse − Σ p·z.

// logits: [n, stride]; targets: [n]; logp, entropy, lse: [n]. One pass over the logits.
extern "C" __global__ void __launch_bounds__(512) score_logits(const float* logits, const int* targets, float* logp,
                                                               float* entropy, float* lse, int vocab, int stride,
                                                               float inverse_temperature) {}

// dlogits[i][j] = (coef[i] · (1[j = target] − p_j) − entropy_coef[i] · p_j · (log p_j + entropy[i])) / temperature: the gradient
// of coef · logp + entropy_coef · entropy. lse, entropy: from score_logits; coef: [n]; entropy_coef: [n] or null;
// dlogits: [n, stride] bf16, zeros beyond the vocabulary. One pass.
extern "C" __global__ void __launch_bounds__(512) logits_gradient(const float* logits, const int* targets, const float* lse,
                                                                  const float* entropy, const float* coef,
                                                                  const float* entropy_coef, bf16* dlogits, int vocab,
                                                                  int stride, float inverse_temperature) {}

// Cross-entropy from soft targets q (distillation; Hinton et al. 2015) and its gradient: loss[i] = Σ q·(lse − z),
// dlogits[i][j] = weight[i] · (p_j − q_j) / temperature. ids, probs: [n, k]; an id of −1 ends a row's list; probs are
// renormalised to sum 1; a list without ids, or of sum 0, has loss 0 and gradient 0. weight, loss: [n]. Reads the logits twice.
extern "C" __global__ void __launch_bounds__(512) distill_gradient(const float* logits, const int* ids, const float* probs,
                                                                   const float* weight, float* loss, bf16* dlogits, int k,
                                                                   int vocab, int stride, float inverse_temperature) {}
