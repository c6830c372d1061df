//! From the config's draft to one the engine can ask: loads it, checks that it fits the policy, says what is
//! odd about it. How it learns is in `distil`.

mod distil;

use std::path::{Path, PathBuf};

use anyhow::Context;
use grpo_policy::{
    backend::{AnyBackend, Backend, Exit, cpu::Trainable},
    engine::draft::{Draft, DraftFault, Length, Model, Source, Suffix},
    error::PolicyError,
    tokenizer::Tokenizer,
    weights::{self, LoadedModel, SaveType, Weights},
};
use sha2::{Digest, Sha256};

use crate::{
    cli::Environment,
    config::{DraftKind, DraftTokens, RunConfig},
    defaults,
    placement::{Learning, Passes},
    policy::Policy,
    setup::{self, OnDownload},
};

pub use distil::{Lesson, distil};

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
    #[error("draft `{draft}` is the folder of a run, not a model")]
    Run { draft: String },
    #[error("draft `{draft}` has changed since the run began: it is {found} and was {expected}")]
    Changed {
        draft: String,
        found: String,
        expected: String,
    },
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
            Self::Run { draft } => format!("use --draft model:{}", in_run(draft).display()),
            Self::Changed { .. } => {
                "put the draft back that draft.lock names, or start a new run".to_owned()
            }
            Self::Layers { layers, .. } => format!("use layers:1 to layers:{}", layers - 1),
        })
    }
}

/// The draft that a run leaves.
fn in_run(run: &str) -> PathBuf {
    Path::new(run).join("draft")
}

/// What [`attach`] found out about a draft.
#[derive(Debug, Default)]
pub struct Attached {
    /// What is odd about it, for the user to read.
    pub odd: Vec<String>,
    /// `sha256:` and the hex digest of the weights it starts with; for a run that trains, of a draft that has
    /// weights.
    pub digest: Option<String>,
}

/// Gives the policy the draft of the config, if it has one. To be called before anything is generated.
/// `trains`: for a run, in which the draft may learn and whose resumption needs to know it again.
///
/// # Errors
/// [`DraftError`], and those of loading a model.
pub fn attach(
    policy: &mut Policy,
    config: &RunConfig,
    trains: bool,
    environment: &Environment,
    on_download: OnDownload<'_>,
) -> anyhow::Result<Attached> {
    let learns = trains && config.generation.draft_learning_rate > 0.0;
    let mut attached = Attached::default();
    let sources = match &config.generation.draft {
        DraftKind::None => return Ok(attached),
        DraftKind::Ngram => sources(policy, || Source::Ngram),
        DraftKind::Suffix => sources(policy, || Source::Suffix(Suffix::default())),
        DraftKind::Layers(wanted) => {
            let (wanted, layers) = (*wanted, policy.backend().spec().num_hidden_layers);
            if wanted >= layers {
                return Err(DraftError::Layers { wanted, layers }.into());
            }
            add_early_exit(policy, wanted, setup::draft_head(config, wanted))?;
            if trains {
                let head = policy.backend().export_trainable(Exit::Early)?;
                attached.digest = Some(digest(&head)?);
            }
            sources(policy, || Source::EarlyExit)
        }
        DraftKind::Model(name) => {
            let mut model = load(name, environment, on_download)?;
            check_tokenizer(name, &model, &policy.tokenizer)?;
            if trains {
                // What trains is on the CPU, where everything is f32, and the digest is of that.
                model.dequantize()?;
                attached.digest = Some(digest(&model.tensors)?);
            }
            let trainable = match learns {
                true => Trainable::Full {
                    keep_reference: false,
                },
                false => Trainable::Nothing,
            };
            let passes = Passes::of(config);
            let drafts = policy
                .place_drafts(model, &Learning { trainable, passes })
                .with_context(|| format!("draft `{name}`"))?;
            if let Some(first) = drafts.first() {
                attached.odd = oddities(name, first, policy);
            }
            let spec = policy.backend().spec();
            let source = |draft| Ok(Source::Model(Box::new(Model::new(draft, spec)?)));
            let sources = drafts.into_iter().map(source);
            sources.collect::<Result<_, PolicyError>>()?
        }
    };
    let length = match config.generation.draft_tokens {
        DraftTokens::Auto => Length::Adaptive(DraftTokens::MOST),
        DraftTokens::Fixed(tokens) => Length::Fixed(tokens),
    };
    let drafts = sources.into_iter().map(|source| {
        let mut draft = Draft::new(source, length)?;
        if learns {
            draft.learn_from(TOP);
        }
        Ok(draft)
    });
    policy.set_drafts(drafts.collect::<Result<_, PolicyError>>()?, learns)?;
    Ok(attached)
}

/// One for each replica.
fn sources(policy: &Policy, source: impl Fn() -> Source<AnyBackend>) -> Vec<Source<AnyBackend>> {
    (0..policy.replicas.count()).map(|_| source()).collect()
}

fn load(
    name: &str,
    environment: &Environment,
    on_download: OnDownload<'_>,
) -> anyhow::Result<LoadedModel> {
    if name == setup::EMBEDDED {
        return Ok(defaults::draft()?);
    }
    let is_model = |folder: &Path| folder.join("config.json").exists();
    if !is_model(Path::new(name)) && is_model(&in_run(name)) {
        let draft = name.to_owned();
        return Err(DraftError::Run { draft }.into());
    }
    setup::named_model(name, "main", environment, on_download)
        .with_context(|| format!("draft `{name}`"))
}

/// Of names, shapes and numbers, whatever the format of the file.
pub(crate) fn digest(weights: &Weights) -> Result<String, PolicyError> {
    let mut hash = Sha256::new();
    for (name, tensor) in weights {
        hash.update(format!("{name} {:?}\n", tensor.dims()));
        hash.update(weights::little_endian(tensor, SaveType::F32)?);
    }
    let hex = hash.finalize();
    Ok(format!("sha256:{hex:x}"))
}

fn oddities(name: &str, draft: &AnyBackend, policy: &Policy) -> Vec<String> {
    let mut odd = Vec::new();
    let (size, policy_size) = (draft.parameters(), policy.backend().parameters());
    if size >= policy_size {
        odd.push(format!(
            "draft `{name}` has {size} parameters and the policy {policy_size}: it will not pay"
        ));
    }
    let (context, longest) = (draft.spec().max_position_embeddings, policy.max_model_len());
    if context < longest {
        odd.push(format!(
            "draft `{name}` has a context of {context} tokens and sequences may have {longest}: drafting ends at {context} tokens"
        ));
    }
    odd
}

/// What to say of a head of `layers:K` that nothing has trained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Untrained {
    /// The usual start of a head that learns.
    Learns(String),
    /// It will stay so, or the model has others.
    Odd(String),
}

/// Whether the head is untrained, asked once the policy has the weights it starts with.
pub fn untrained_head(policy: &Policy, config: &RunConfig, trains: bool) -> Option<Untrained> {
    let DraftKind::Layers(layers) = config.generation.draft else {
        return None;
    };
    if policy.has_trained_head() {
        return None;
    }
    let others: Vec<String> = setup::draft_heads(config, policy.backend().spec().num_hidden_layers)
        .iter()
        .map(|layers| DraftKind::Layers(*layers).to_string())
        .collect();
    let others = match others.as_slice() {
        [] => String::new(),
        heads => format!(" (the model has one for {})", heads.join(", ")),
    };
    let rate = config.generation.draft_learning_rate;
    let learns = trains && rate > 0.0;
    let what = match learns {
        true => format!("it learns with draft_learning_rate {rate}"),
        false => "a run with a draft_learning_rate above 0 trains it".to_owned(),
    };
    let text = format!("the head of layers:{layers} is untrained{others}; {what}");
    Some(match learns && others.is_empty() {
        true => Untrained::Learns(text),
        false => Untrained::Odd(text),
    })
}

/// Says, once, that the draft was given up and why; a line `hint:` follows.
pub fn take_fault(policy: &mut Policy, config: &RunConfig) -> Option<String> {
    let what = match policy.take_draft_fault()? {
        DraftFault::Logits => "the draft's logits are not finite",
        DraftFault::Gradient => "the draft's gradient is not finite",
    };
    let draft = &config.generation.draft;
    Some(format!(
        "draft `{draft}`: {what}; going on without it\nhint: lower draft_learning_rate, or check the draft's file"
    ))
}

/// The policy's early exit with the head in `file`, else an untrained one.
fn add_early_exit(policy: &mut Policy, layers: usize, file: Option<PathBuf>) -> anyhow::Result<()> {
    let mut add = |head: Option<&Weights>| {
        policy.replicas.iter_mut().try_for_each(|replica| {
            replica.backend.bind()?;
            replica.backend.add_early_exit(layers, head)
        })
    };
    let Some(file) = file else {
        return Ok(add(None)?);
    };
    let added = weights::read_safetensors(&file).and_then(|head| add(Some(&head)));
    Ok(added.map_err(|reason| DraftError::Head { file, reason })?)
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
