//! From the config's draft to one the engine can ask: loads it, checks that it fits the policy, and keeps
//! it near the policy while that learns.

use std::path::PathBuf;

use anyhow::Context;
use grpo_policy::{
    backend::{
        Backend,
        cpu::{CpuBackend, Trainable},
    },
    engine::draft::{Draft, Length, Model, Source, Suffix},
    error::PolicyError,
    tokenizer::Tokenizer,
    types::{PackedBatch, TopTokens},
    weights::{self, LoadedModel},
};

use crate::{
    cli::Environment,
    config::{DraftKind, DraftTokens, RunConfig},
    defaults,
    policy::Policy,
    setup::{self, OnDownload},
    update::{Sequence, split},
};

/// Likely tokens of a position that a draft is distilled from. They hold nearly all of the mass of a
/// trained model; more would cost memory for each token of a step.
const TOP: usize = 16;

/// A draft that cannot serve this policy.
#[derive(Debug, thiserror::Error)]
pub enum DraftError {
    #[error(
        "draft `{draft}` has another tokenizer than the policy: token {id} is {} there and {} here",
        text(theirs.as_ref()),
        text(ours.as_ref())
    )]
    Tokenizer {
        draft: String,
        id: u32,
        ours: Option<String>,
        theirs: Option<String>,
    },
    #[error("draft layers:{wanted} of a policy with {layers} layers")]
    Layers { wanted: usize, layers: usize },
    #[error("the draft's head {} cannot be used", file.display())]
    Head {
        file: PathBuf,
        #[source]
        reason: PolicyError,
    },
}

fn text(token: Option<&String>) -> String {
    token.map_or_else(|| "missing".to_owned(), |token| format!("`{token}`"))
}

impl DraftError {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Tokenizer { .. } => {
                "take a smaller model of the policy's family, or --draft ngram, which needs none"
                    .to_owned()
            }
            Self::Head { .. } => {
                "delete the model's folder draft_head to start with an untrained one".to_owned()
            }
            Self::Layers { layers, .. } => format!("use layers:1 to layers:{}", layers - 1),
        })
    }
}

/// Gives the policy the draft of the config, if it has one. To be called before anything is generated.
/// Returns what is odd about it, for the user to read.
///
/// # Errors
/// [`DraftError`], and those of loading a model.
pub fn attach(
    policy: &mut Policy,
    config: &RunConfig,
    learns: bool,
    environment: &Environment,
    on_download: OnDownload<'_>,
) -> anyhow::Result<Option<String>> {
    let learns = learns && config.generation.draft_learning_rate > 0.0;
    let mut odd = None;
    let source = match &config.generation.draft {
        DraftKind::None => return Ok(None),
        DraftKind::Ngram => Source::Ngram,
        DraftKind::Suffix => Source::Suffix(Suffix::default()),
        DraftKind::Layers(wanted) => {
            let (wanted, layers) = (*wanted, policy.backend.spec().num_hidden_layers);
            if wanted >= layers {
                return Err(DraftError::Layers { wanted, layers }.into());
            }
            add_early_exit(policy, wanted, setup::draft_head(config, wanted))?;
            Source::EarlyExit
        }
        DraftKind::Model(name) => {
            let model = match name.as_str() {
                setup::EMBEDDED => defaults::draft()?,
                name => setup::named_model(name, "main", environment, on_download)
                    .with_context(|| format!("draft `{name}`"))?,
            };
            check_tokenizer(name, &model, &policy.tokenizer)?;
            let trainable = match learns {
                true => Trainable::Full {
                    keep_reference: false,
                },
                false => Trainable::Nothing,
            };
            let checkpointing = config.training.gradient_checkpointing;
            let draft = CpuBackend::new(model.spec, &model.tensors, &trainable, checkpointing)?;
            let (draft_size, size) = (draft.parameters(), policy.backend.parameters());
            odd = (draft_size >= size).then(|| {
                format!("draft `{name}` has {draft_size} parameters and the policy {size}: it will not pay")
            });
            Source::Model(Box::new(Model::new(draft, policy.backend.spec())?))
        }
    };
    let length = match config.generation.draft_tokens {
        DraftTokens::Auto => Length::Adaptive(DraftTokens::MOST),
        DraftTokens::Fixed(tokens) => Length::Fixed(tokens),
    };
    let mut draft = Draft::new(source, length)?;
    if learns {
        draft.learn_from(TOP);
    }
    policy.set_draft(draft);
    Ok(odd)
}

/// The policy's early exit with the head in `file`, else an untrained one.
fn add_early_exit(policy: &mut Policy, layers: usize, file: Option<PathBuf>) -> anyhow::Result<()> {
    let Some(file) = file else {
        return Ok(policy.backend.add_early_exit(layers, None)?);
    };
    let trained = weights::read_safetensors(&file);
    let added = trained.and_then(|head| policy.backend.add_early_exit(layers, Some(&head)));
    Ok(added.map_err(|reason| DraftError::Head { file, reason })?)
}

/// What a draft learnt from a step.
#[derive(Clone, Copy, Debug)]
pub struct Lesson {
    /// Cross-entropy from the policy's likely tokens to the draft, nats a token, before the update.
    pub loss: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
}

/// Distils the draft on completions of the policy as it was when it drew them: one optimizer step towards
/// the distributions that verification has computed anyway. `None` for a draft that does not learn.
///
/// # Errors
/// A gradient that is not finite; the draft is then as before.
pub fn distil(
    policy: &mut Policy,
    sequences: &[Sequence<'_>],
    config: &RunConfig,
) -> anyhow::Result<Option<Lesson>> {
    let taught: Vec<Sequence<'_>> = sequences
        .iter()
        .filter(|s| !s.completion.top.is_empty())
        .copied()
        .collect();
    let Some((model, exit)) = policy.learning_draft().filter(|_| !taught.is_empty()) else {
        return Ok(None);
    };
    let tokens: usize = taught.iter().map(|s| s.completion.tokens.len()).sum();
    let mut loss = 0.0;
    for part in split(&taught, config.training.micro_batch_tokens as usize) {
        let mut batch = PackedBatch::default();
        for s in part {
            let ids = [s.prompt_ids, &s.completion.tokens].concat();
            batch.push(&ids, s.prompt_ids.len());
        }
        let targets: Vec<TopTokens> = part.iter().flat_map(|s| s.completion.top.clone()).collect();
        let temperature = config.generation.temperature as f32;
        loss += model.distill(&batch, &targets, temperature, 1.0 / tokens as f64, exit)?;
    }
    let step = config.optimizer.step(config.generation.draft_learning_rate);
    let grad_norm = model.optimizer_step(&step, exit)?;
    Ok(Some(Lesson { loss, grad_norm }))
}

/// Equal sizes are not enough: a draft that means other words is wrong with full confidence.
fn check_tokenizer(name: &str, draft: &LoadedModel, policy: &Tokenizer) -> Result<(), DraftError> {
    let theirs = &draft.tokenizer;
    let most = policy.vocab_size().max(theirs.vocab_size()) as u32;
    let differs = (0..most).find(|id| policy.token(*id) != theirs.token(*id));
    differs.map_or(Ok(()), |id| {
        Err(DraftError::Tokenizer {
            draft: name.to_owned(),
            id,
            ours: policy.token(id),
            theirs: theirs.token(id),
        })
    })
}
