//! The state of one request and of one completion, and what a valid request is. Decides nothing about
//! order or memory.

use super::{
    EngineConfig,
    kv::{ContentId, ROOT},
    sampler,
    stop::{StopWatch, cut},
    telemetry::Clock,
};
use crate::{
    backend::{BlockId, SampleArgs, Sampled},
    engine::sampler::Proposal,
    error::PolicyError,
    tokenizer::Tokenizer,
    types::{Completion, Finish, Request, Telemetry, TopTokens},
};
use std::{sync::Arc, time::Instant};

/// Rising with arrival, then with the index in the request: the order of priority and of results.
pub(super) type SequenceId = u64;
pub(super) type GroupId = u64;

/// One request and what its completions share.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub(super) request: Arc<Request>,
    /// Completions that do not run or wait to run any more are gone from here.
    pub(super) live: u32,
    /// Completions that were never scheduled.
    pub(super) unstarted: u32,
    /// The completion that computes the prompt now; its siblings wait for it.
    pub(super) prefilling: Option<SequenceId>,
    /// Blocks of the prompt without its last token, referenced until every completion has started.
    pub(super) hold: Option<Vec<BlockId>>,
}

impl Group {
    pub(super) fn new(request: Request) -> Self {
        Self {
            live: request.n,
            unstarted: request.n,
            request: Arc::new(request),
            prefilling: None,
            hold: None,
        }
    }

    /// Prompt tokens whose keys and values all completions can share. The last one is not among them: each
    /// completion runs it again to get logits to sample from, one row for one small copy of a block.
    pub(super) fn shareable(&self) -> usize {
        self.request.prompt.len() - 1
    }
}

/// What speculation did for one completion.
#[derive(Clone, Debug, Default)]
pub(super) struct Drafting {
    /// Proposals verified, their tokens, and those of them that became part of the completion.
    pub(super) drafts: u32,
    pub(super) tokens: u32,
    pub(super) accepted: u32,
    /// Proposals that were not accepted to their end.
    pub(super) rejected: u32,
    /// By position in the proposal.
    pub(super) accepted_per_pos: Vec<u32>,
}

impl Drafting {
    pub(super) fn add(&mut self, proposed: usize, accepted: usize) {
        self.drafts += 1;
        self.tokens += proposed as u32;
        self.accepted += accepted as u32;
        self.rejected += u32::from(accepted < proposed);
        if self.accepted_per_pos.len() < proposed {
            self.accepted_per_pos.resize(proposed, 0);
        }
        let counts = self.accepted_per_pos.iter_mut().take(accepted);
        counts.for_each(|count| *count += 1);
    }

    /// How likely a drafted token is accepted when those before it were, once there is enough to say. What
    /// follows a rejected token says nothing.
    pub(super) fn acceptance(&self) -> Option<f64> {
        let decided = self.accepted + self.rejected;
        (decided >= 8).then(|| f64::from(self.accepted) / f64::from(decided))
    }
}

/// One completion in the making.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    pub(super) group: GroupId,
    pub(super) index: u32,
    /// Prompt, then everything sampled.
    pub(super) tokens: Vec<u32>,
    pub(super) prompt_len: usize,
    /// Leading tokens whose keys and values are in `blocks`; always less than `tokens.len()`.
    pub(super) cached: usize,
    /// Blocks in order, as many as `cached` tokens fill, the last one perhaps partly.
    pub(super) blocks: Vec<BlockId>,
    /// Leading blocks that went through [`super::kv::BlockPool::register`], and the name of the last.
    pub(super) registered: usize,
    pub(super) chain: ContentId,
    pub(super) started: bool,
    pub(super) cached_prompt: usize,
    pub(super) clock: Clock,
    pub(super) stream: u64,
    pub(super) drafting: Drafting,
    logprobs: Vec<f32>,
    policy_logprobs: Vec<f32>,
    top: Vec<TopTokens>,
    stop: Option<StopWatch>,
}

impl Sequence {
    pub(super) fn new(group: GroupId, request: &Request, index: u32, now: Instant) -> Self {
        Self {
            group,
            index,
            tokens: request.prompt.clone(),
            prompt_len: request.prompt.len(),
            cached: 0,
            blocks: Vec::new(),
            registered: 0,
            chain: ROOT,
            started: false,
            cached_prompt: 0,
            clock: Clock::start(now),
            stream: sampler::stream_key(request.seed, index),
            drafting: Drafting::default(),
            logprobs: Vec::new(),
            policy_logprobs: Vec::new(),
            top: Vec::new(),
            stop: StopWatch::new(&request.sampling.stop),
        }
    }

    /// Tokens still to be run before the next one can be sampled; 1 while decoding.
    pub(super) fn pending(&self) -> usize {
        self.tokens.len() - self.cached
    }

    pub(super) fn sample_args<'a>(
        &'a self,
        request: &'a Request,
        proposal: Option<&'a Proposal>,
        top: usize,
    ) -> SampleArgs<'a> {
        SampleArgs {
            top,
            proposal,
            params: &request.sampling,
            stream: self.stream,
            position: self.tokens.len() as u64,
            history: &self.tokens,
            ahead: 0,
        }
    }

    /// Appends a sampled token and says whether it is the last.
    pub(super) fn push(
        &mut self,
        sampled: Sampled,
        request: &Request,
        config: &EngineConfig,
        tokenizer: &Tokenizer,
    ) -> Result<Option<Finish>, PolicyError> {
        self.tokens.push(sampled.token);
        self.logprobs.push(sampled.logprob);
        self.policy_logprobs.push(sampled.policy_logprob);
        if !sampled.top.ids.is_empty() {
            self.top.push(sampled.top);
        }
        let params = &request.sampling;
        let eos = !params.ignore_eos && tokenizer.eos_ids().contains(&sampled.token);
        // Not `eos ||`: the watch must see every token that leaves text behind, and no other.
        let stopped = match &mut self.stop {
            Some(watch) if !eos => watch.push(tokenizer, &params.stop, sampled.token)?,
            _ => false,
        };
        let full = self.generated() >= params.max_tokens as usize
            || self.tokens.len() >= config.max_model_len;
        Ok(if eos || stopped {
            Some(Finish::Stop)
        } else if full {
            Some(Finish::Length)
        } else {
            None
        })
    }

    pub(super) fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// The finished completion; `kv_bytes` is what it held at the end.
    pub(super) fn into_completion(
        self,
        request: &Request,
        finish: Finish,
        kv_bytes: u64,
        tokenizer: &Tokenizer,
    ) -> Result<Completion, PolicyError> {
        let tokens = self.tokens[self.prompt_len..].to_vec();
        // A tokenizer need not count its end-of-text token as special, so it is left out here.
        let spoken = match tokens.split_last() {
            Some((last, before))
                if finish == Finish::Stop && tokenizer.eos_ids().contains(last) =>
            {
                before
            }
            _ => &tokens[..],
        };
        let text = tokenizer.decode(spoken)?;
        let telemetry = Telemetry {
            prompt_tokens: self.prompt_len as u32,
            cached_prompt_tokens: self.cached_prompt as u32,
            generated_tokens: tokens.len() as u32,
            draft_tokens: self.drafting.tokens,
            accepted_tokens: self.drafting.accepted,
            kv_bytes,
            ..self.clock.finish(Instant::now())
        };
        Ok(Completion {
            request: request.id,
            index: self.index,
            text: cut(&text, &request.sampling.stop).to_owned(),
            tokens,
            logprobs: self.logprobs,
            policy_logprobs: self.policy_logprobs,
            finish,
            telemetry,
            drafts: self.drafting.drafts,
            accepted_per_pos: self.drafting.accepted_per_pos,
            top: self.top,
        })
    }
}

/// Refuses what cannot be sampled, with [`PolicyError::Request`], or cannot ever fit into the pool, with
/// [`PolicyError::KvExhausted`]. The latter counts the longest completion allowed: a run must not
/// die after hours because one completion happened to be long.
pub(super) fn validate(request: &Request, config: &EngineConfig) -> Result<(), PolicyError> {
    let params = &request.sampling;
    let length = request.prompt.len();
    let wrong = if length == 0 {
        Some("the prompt is empty".to_owned())
    } else if request.n == 0 {
        Some("n is 0".to_owned())
    } else if length >= config.max_model_len {
        Some(format!(
            "the prompt of {length} tokens leaves no room in a context of {}",
            config.max_model_len
        ))
    } else if params.max_tokens == 0 {
        Some("max_tokens is 0".to_owned())
    } else if params.stop.iter().any(String::is_empty) {
        Some("a stop string is empty".to_owned())
    } else {
        [
            ("temperature", params.temperature, params.temperature >= 0.0),
            (
                "top_p",
                params.top_p,
                params.top_p > 0.0 && params.top_p <= 1.0,
            ),
            ("min_p", params.min_p, (0.0..=1.0).contains(&params.min_p)),
            (
                "repetition_penalty",
                params.repetition_penalty,
                params.repetition_penalty > 0.0,
            ),
        ]
        .into_iter()
        .find(|(_, value, in_range)| !value.is_finite() || !in_range)
        .map(|(name, value, _)| format!("{name} {value} is out of range"))
    };
    if let Some(reason) = wrong {
        return Err(PolicyError::Request {
            request: request.id,
            reason,
        });
    }
    let longest = config
        .max_model_len
        .min(length.saturating_add(params.max_tokens as usize));
    // The last token sampled is never run.
    let needed = (longest - 1).div_ceil(config.block_size);
    if needed > config.kv_blocks {
        return Err(PolicyError::KvExhausted {
            tokens: longest,
            needed,
            available: config.kv_blocks,
        });
    }
    Ok(())
}
