//! A toy language model behind the [`Backend`] border, and the same model run naively, one sequence at a
//! time without blocks.
//!
//! The "key" of a token is a hash of it and of the key before it, kept in a paged pool. Logits are a
//! hash of all keys of the sequence. A wrong block table, a missed copy, a slot overwritten by a neighbour
//! or a stale prefix all change the logits.

use std::collections::HashSet;

use crate::{
    backend::{Backend, BlockId, Drafted, Exit, OptimStep, Pass, SampleArgs, Sampled, StepRow},
    engine::{
        EngineConfig,
        sampler::{Scratch, draft, sample, stream_key, verify},
    },
    error::PolicyError,
    spec::{Family, ModelSpec},
    tokenizer::Tokenizer,
    types::{Finish, PackedBatch, Request, TokenScores, TopTokens},
};

/// Bytes of each token; the last one is end-of-text. Multi-byte characters come in pieces, and stop strings
/// span tokens.
pub(super) const TOKENS: [&[u8]; 24] = [
    b"a",
    b"b",
    b"c",
    b"d",
    b"e",
    b" ",
    b"\n",
    b"ab",
    b"cd",
    b" the",
    b"S",
    b"T",
    b"ST",
    b"OP",
    b"TOP",
    b"1",
    b"2",
    b"\xc3",
    b"\xa9",
    b"\xe2",
    b"\x82",
    b"\xac",
    b"\xe2\x82",
    b"<end>",
];
pub(super) const EOS: u32 = TOKENS.len() as u32 - 1;
pub(super) const KV_BYTES: usize = 10;

/// A byte-level tokenizer over [`TOKENS`]; it only has to decode.
pub(super) fn tokenizer() -> Tokenizer {
    let mut vocabulary = serde_json::Map::new();
    for (id, bytes) in TOKENS.iter().enumerate() {
        let text: String = bytes.iter().map(|b| byte_char(*b)).collect();
        vocabulary.insert(text, id.into());
    }
    let json = serde_json::json!({
        "version": "1.0",
        "added_tokens": [{
            "id": EOS, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }],
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    Tokenizer::from_json_bytes(json.to_string().as_bytes(), &[EOS]).unwrap()
}

/// GPT-2's printable stand-in for a byte.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| (33..=126).contains(&b) || (161..=172).contains(&b) || b >= 174;
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(256 + rank).unwrap()
}

pub(super) fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn key(before: u64, token: u32) -> u64 {
    mix(before ^ u64::from(token).wrapping_mul(0xA24B_AED4_963E_E407))
}

/// "Attention": order matters through the keys themselves.
fn attend(sum: u64, key: u64) -> u64 {
    sum.wrapping_add(mix(key))
}

fn logits(sum: u64) -> Vec<f32> {
    let logit = |t: usize| (mix(sum ^ (t as u64 + 1)) % 4096) as f32 / 4096.0 * 6.0 - 3.0;
    let mut logits: Vec<f32> = (0..TOKENS.len()).map(logit).collect();
    logits[EOS as usize] -= 1.0;
    logits
}

/// The toy model on a paged pool.
#[derive(Debug)]
pub(super) struct ScriptedBackend {
    /// Stands for the weights: another salt is another model.
    pub(super) salt: u64,
    /// A fault to inject.
    pub(super) skip_copies: bool,
    /// Another fault: every proposed token is accepted.
    pub(super) trusts_drafts: bool,
    /// A third: what it proposes in this call and later comes of logits that are not finite.
    pub(super) diverges_at: Option<usize>,
    pub(super) proposals: usize,
    /// Fails the step with this number.
    pub(super) fail_at: Option<usize>,
    pub(super) steps: usize,
    pub(super) copies: usize,
    pub(super) widest: usize,
    pub(super) most_tokens: usize,
    pub(super) computed: usize,
    /// Rows that started behind position 0 and had more than one token: chunked or cached prefill.
    pub(super) late_chunks: usize,
    /// Two writes to one slot in one step, a row without enough blocks, or one beyond the context.
    pub(super) violations: usize,
    keys: Vec<u64>,
    block_size: usize,
    spec: ModelSpec,
}

impl ScriptedBackend {
    pub(super) fn new(salt: u64) -> Self {
        Self {
            salt,
            skip_copies: false,
            trusts_drafts: false,
            diverges_at: None,
            proposals: 0,
            fail_at: None,
            steps: 0,
            copies: 0,
            widest: 0,
            most_tokens: 0,
            computed: 0,
            late_chunks: 0,
            violations: 0,
            keys: Vec::new(),
            block_size: 0,
            spec: ModelSpec {
                family: Family::Llama,
                vocab_size: TOKENS.len(),
                hidden_size: 1,
                intermediate_size: 1,
                num_hidden_layers: 1,
                num_attention_heads: 1,
                num_key_value_heads: 1,
                head_dim: 1,
                max_position_embeddings: 1 << 20,
                rms_norm_eps: 1e-5,
                rope_theta: 1e4,
                rope_scaling: None,
                tie_word_embeddings: true,
                qkv_bias: false,
                o_bias: false,
                qk_norm: false,
            },
        }
    }

    /// The same model with a shorter context.
    pub(super) fn with_context(salt: u64, tokens: usize) -> Self {
        let mut backend = Self::new(salt);
        backend.spec.max_position_embeddings = tokens;
        backend
    }

    fn slot(&self, row: &StepRow<'_>, position: usize) -> usize {
        row.blocks[position / self.block_size] as usize * self.block_size
            + position % self.block_size
    }

    fn write(&mut self, rows: &[StepRow<'_>]) {
        let mut written = HashSet::new();
        for row in rows {
            let end = row.position + row.tokens.len();
            let context = self.spec.max_position_embeddings;
            if end > context || row.blocks.len() * self.block_size < end {
                self.violations += 1;
                continue;
            }
            let mut before = match row.position {
                0 => self.salt,
                position => self.keys[self.slot(row, position - 1)],
            };
            for (i, token) in row.tokens.iter().enumerate() {
                let slot = self.slot(row, row.position + i);
                before = key(before, *token);
                self.keys[slot] = before;
                self.violations += usize::from(!written.insert(slot));
            }
        }
    }
}

impl ScriptedBackend {
    /// Logits before each proposed token and after the last.
    fn row_logits(&self, row: &StepRow<'_>, args: &SampleArgs<'_>) -> Vec<Vec<f32>> {
        let end = row.position + row.tokens.len();
        let proposed = args.proposal.map_or(0, |p| p.tokens.len());
        let after = |end: usize| {
            let keys = (0..end).map(|position| self.keys[self.slot(row, position)]);
            logits(keys.fold(0, attend))
        };
        (end - proposed..=end).map(after).collect()
    }
}

impl Backend for ScriptedBackend {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn kv_bytes_per_token(&self) -> usize {
        KV_BYTES
    }

    fn init_kv(&mut self, blocks: usize, block_size: usize) -> Result<(), PolicyError> {
        self.keys = vec![0xDEAD; blocks * block_size];
        self.block_size = block_size;
        Ok(())
    }

    fn copy_kv(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), PolicyError> {
        self.copies += copies.len();
        for &(from, to) in copies {
            let from = from as usize * self.block_size;
            if !self.skip_copies {
                self.keys
                    .copy_within(from..from + self.block_size, to as usize * self.block_size);
            }
        }
        Ok(())
    }

    fn step(&mut self, rows: &[StepRow<'_>]) -> Result<Vec<Vec<Sampled>>, PolicyError> {
        self.steps += 1;
        if self.fail_at == Some(self.steps) {
            return Err(PolicyError::Misuse("scripted failure"));
        }
        let tokens = rows.iter().map(|row| row.tokens.len()).sum();
        self.widest = self.widest.max(rows.len());
        self.most_tokens = self.most_tokens.max(tokens);
        self.computed += tokens;
        let late = |row: &&StepRow<'_>| row.position > 0 && row.tokens.len() > 1;
        self.late_chunks += rows.iter().filter(late).count();
        // All rows write before any row reads, as in a layer of a real model.
        self.write(rows);
        let mut scratch = Scratch::default();
        let sample = |row: &StepRow<'_>| {
            let Some(args) = &row.sample else {
                return Ok(Vec::new());
            };
            let logits = self.row_logits(row, args);
            if let (Some(proposal), true) = (args.proposal, self.trusts_drafts) {
                return Ok(trusting(&logits, args, &proposal.tokens));
            }
            verify(|i| &logits[i], args, &mut scratch)
        };
        rows.iter().map(sample).collect()
    }

    fn propose(&mut self, rows: &[StepRow<'_>], _: Exit) -> Result<Vec<Drafted>, PolicyError> {
        self.proposals += 1;
        if self.diverges_at.is_some_and(|at| self.proposals >= at) {
            return Err(PolicyError::NonFiniteLogits { position: 0 });
        }
        self.write(rows);
        let propose = |row: &StepRow<'_>| {
            let args = row.sample.as_ref().unwrap();
            draft(&self.row_logits(row, args)[0], args)
        };
        rows.iter().map(propose).collect()
    }

    fn score(&mut self, _: &PackedBatch, _: f32, _: Pass) -> Result<TokenScores, PolicyError> {
        Err(PolicyError::Misuse("the scripted model does not train"))
    }

    fn backward(&mut self, _: &[f32]) -> Result<(), PolicyError> {
        Err(PolicyError::Misuse("the scripted model does not train"))
    }

    fn distill(
        &mut self,
        _: &PackedBatch,
        _: &[TopTokens],
        _: f32,
        _: f64,
        _: Exit,
    ) -> Result<f64, PolicyError> {
        Err(PolicyError::Misuse("the scripted model does not train"))
    }

    fn optimizer_step(&mut self, _: &OptimStep, _: Exit) -> Result<f64, PolicyError> {
        Err(PolicyError::Misuse("the scripted model does not train"))
    }
}

/// All proposed tokens, and one more.
fn trusting(logits: &[Vec<f32>], args: &SampleArgs<'_>, proposed: &[u32]) -> Vec<Sampled> {
    let accepted = |token: &u32| Sampled {
        token: *token,
        logprob: 0.0,
        policy_logprob: 0.0,
        top: TopTokens::default(),
    };
    let mut out: Vec<Sampled> = proposed.iter().map(accepted).collect();
    let last = &logits[proposed.len()];
    out.push(sample(last, args, &mut Scratch::default()).unwrap());
    out
}

/// What naive generation says a completion is.
#[derive(Debug, PartialEq)]
pub(super) struct Expected {
    pub(super) tokens: Vec<u32>,
    pub(super) logprobs: Vec<f32>,
    pub(super) policy_logprobs: Vec<f32>,
    pub(super) text: String,
    pub(super) finish: Finish,
}

/// One completion from the definition: no blocks, no batch, all text decoded anew at every token.
pub(super) fn naive(
    salt: u64,
    request: &Request,
    index: u32,
    config: &EngineConfig,
    tokenizer: &Tokenizer,
) -> Expected {
    let params = &request.sampling;
    let mut tokens = request.prompt.clone();
    let prompt = tokens.len();
    let (mut logprobs, mut policy_logprobs) = (Vec::new(), Vec::new());
    loop {
        let args = SampleArgs {
            params,
            stream: stream_key(request.seed, index),
            position: tokens.len() as u64,
            history: &tokens,
            proposal: None,
            top: 0,
            ahead: 0,
        };
        let logits = logits_after(salt, &tokens);
        let sampled = sample(&logits, &args, &mut Scratch::default()).unwrap();
        tokens.push(sampled.token);
        logprobs.push(sampled.logprob);
        policy_logprobs.push(sampled.policy_logprob);
        let text = tokenizer.decode(&tokens[prompt..]).unwrap();
        let stop = params
            .stop
            .iter()
            .filter_map(|s| text.find(s.as_str()))
            .min();
        let finish = if (sampled.token == EOS && !params.ignore_eos) || stop.is_some() {
            Finish::Stop
        } else if tokens.len() - prompt == params.max_tokens as usize
            || tokens.len() == config.max_model_len
        {
            Finish::Length
        } else {
            continue;
        };
        return Expected {
            tokens: tokens[prompt..].to_vec(),
            logprobs,
            policy_logprobs,
            text: text[..stop.unwrap_or(text.len())].to_owned(),
            finish,
        };
    }
}

/// Logits after `tokens`, from the definition.
pub(super) fn logits_after(salt: u64, tokens: &[u32]) -> Vec<f32> {
    let mut before = salt;
    logits(tokens.iter().fold(0, |sum, token| {
        before = key(before, *token);
        attend(sum, before)
    }))
}
