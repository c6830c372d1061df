//! From the config's draft to one the engine can ask: loads it and checks that it fits the policy.

use anyhow::Context;
use grpo_policy::{
    backend::{
        Backend,
        cpu::{CpuBackend, Trainable},
    },
    engine::draft::{Draft, Length, Model, Source, Suffix},
    tokenizer::Tokenizer,
    weights::LoadedModel,
};

use crate::{
    cli::Environment,
    config::{DraftKind, DraftTokens, RunConfig},
    policy::Policy,
    setup::{self, OnDownload},
};

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
    environment: &Environment,
    on_download: OnDownload<'_>,
) -> anyhow::Result<Option<String>> {
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
            Source::Layers(wanted)
        }
        DraftKind::Model(name) => {
            let model = setup::named_model(name, "main", environment, on_download)
                .with_context(|| format!("draft `{name}`"))?;
            check_tokenizer(name, &model, &policy.tokenizer)?;
            let draft = CpuBackend::new(model.spec, &model.tensors, &Trainable::Nothing, false)?;
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
    policy.set_draft(Draft::new(source, length)?);
    Ok(odd)
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
