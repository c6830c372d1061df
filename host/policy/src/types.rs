//! Plain structs that cross the border of this crate: requests in, completions and packed batches through.
//! No tensors, no files, no behaviour beyond constructors.

mod packed;

pub use packed::{PackedBatch, Span};

use serde::{Deserialize, Serialize};

/// How the completions of one prompt are drawn. Names and defaults follow vLLM and TRL.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingParams {
    /// Softmax temperature, ≥ 0. `0` means greedy: the most likely token, log-prob under temperature 1.
    pub temperature: f32,
    /// Nucleus: the smallest set of tokens whose mass reaches `top_p`, in (0, 1]. `1` is off.
    pub top_p: f32,
    /// Keep the `top_k` most likely tokens. `0` is off.
    pub top_k: u32,
    /// Drop tokens less likely than `min_p` times the most likely one, in [0, 1]. `0` is off.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens already in prompt or completion (CTRL). `1` is off.
    pub repetition_penalty: f32,
    /// Most tokens of one completion.
    pub max_tokens: u32,
    /// Texts that end a completion; the completion's text is cut before them.
    pub stop: Vec<String>,
    /// Go on after the end-of-text token (benchmarks).
    pub ignore_eos: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            max_tokens: 512,
            stop: Vec::new(),
            ignore_eos: false,
        }
    }
}

/// One prompt to be continued `n` times.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The caller's key; comes back in every completion.
    pub id: u64,
    /// Prompt token ids, at least one.
    pub prompt: Vec<u32>,
    /// Completions wanted, at least one.
    pub n: u32,
    pub sampling: SamplingParams,
    /// With `id` not involved: the same seed and prompt give the same completions. Completion `i` draws
    /// from the stream keyed by `(seed, i, position)`, so batching never changes what is sampled.
    pub seed: u64,
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// End-of-text token or a stop string.
    Stop,
    /// `max_tokens` or the model's context length.
    Length,
    /// Cancelled by the caller.
    Abort,
}

/// Inference cost of one completion. Times in milliseconds, names after vLLM's per-request statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Telemetry {
    /// Arrival to last token.
    pub latency_ms: f64,
    /// Arrival to first scheduling.
    pub queue_ms: f64,
    /// First scheduling to first token.
    pub prefill_ms: f64,
    /// First token to last token.
    pub decode_ms: f64,
    pub prompt_tokens: u32,
    /// Prompt tokens whose keys and values were already in the cache.
    pub cached_prompt_tokens: u32,
    pub generated_tokens: u32,
    /// Tokens proposed by a draft, and those of them the target accepted.
    pub draft_tokens: u32,
    pub accepted_tokens: u32,
    /// Bytes of the KV blocks this completion referred to when it was longest; a block shared by `k`
    /// completions counts `1/k` to each.
    pub kv_bytes: u64,
}

/// The most likely tokens of one position under the policy at the sampling temperature, most likely first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TopTokens {
    pub ids: Vec<u32>,
    /// Of the whole softmax, so they add up to less than 1.
    pub probabilities: Vec<f32>,
}

/// One finished continuation.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// [`Request::id`].
    pub request: u64,
    /// `0..n` within the request.
    pub index: u32,
    /// Every sampled token, the end-of-text token or the ones of the stop string included.
    pub tokens: Vec<u32>,
    /// Per token: log-prob under the distribution really sampled from (after penalty, temperature and
    /// truncation, renormalised). This is the behaviour policy of importance correction.
    pub logprobs: Vec<f32>,
    /// Per token: log-prob under the policy at the sampling temperature over the whole vocabulary, without
    /// penalty or truncation. This is `old` in the GRPO ratio; equals `logprobs` unless top-p, top-k, min-p
    /// or the penalty is on.
    pub policy_logprobs: Vec<f32>,
    /// `tokens` as text, without end-of-text and cut before the stop string.
    pub text: String,
    pub finish: Finish,
    pub telemetry: Telemetry,
    /// Proposals of a draft that were verified.
    pub drafts: u32,
    /// Of those, how many had their first, second, … token accepted; as long as the longest proposal.
    pub accepted_per_pos: Vec<u32>,
    /// Per token, what else the policy might have said: what a draft is distilled from. Empty unless a
    /// draft learns.
    pub top: Vec<TopTokens>,
}

/// What a scoring pass returns: one entry per scored token of the batch, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenScores {
    /// Log-prob of the token at the asked temperature, nats.
    pub logprobs: Vec<f32>,
    /// Entropy of the distribution it was scored under, nats.
    pub entropy: Vec<f32>,
}
