//! The policy of a run: weights on a device with their tokenizer and rollout engine, from whichever
//! source the user named; and its files in a checkpoint folder. Knows no rewards and no rows.

use std::path::{Path, PathBuf};

use anyhow::Context;
use grpo_policy::{
    backend::{
        Backend, Exit,
        cpu::{CpuBackend, Trainable},
    },
    chat::{ChatOptions, ChatTemplate},
    engine::{Engine, EngineConfig, Progress, draft::Draft},
    tokenizer::Tokenizer,
    types::{Completion, Request},
    weights::{self, LoadedModel, LoraConfig, SaveType},
};

use crate::{
    config::RunConfig,
    types::{Message, PromptBody},
};

/// Tokens per KV block (vLLM's default).
const BLOCK_SIZE: usize = 16;

/// Most memory the KV pool takes when its size is not configured.
const KV_BYTES: usize = 2 << 30;

/// What the draft has learnt, in a checkpoint.
const DRAFT_FILE: &str = "draft.u32";
/// Weights and optimizer of a draft that is distilled, in a checkpoint.
const DRAFT_WEIGHTS: &str = "draft.safetensors";
const DRAFT_OPTIMIZER: &str = "draft_optimizer.safetensors";

/// Where an exported model keeps the head of its early exit. Not beside the weights: vLLM loads every
/// safetensors file that it finds there.
pub fn draft_head_file(model: &Path, layers: usize) -> PathBuf {
    model.join(format!("draft_head/layers-{layers}.safetensors"))
}

/// Prompt tokens run beside the decoding rows of one step.
const PREFILL_TOKENS: usize = 512;

/// What of a policy trains.
#[derive(Clone, Debug, PartialEq)]
pub enum Mode {
    Inference,
    Full { keep_reference: bool },
    Lora { config: LoraConfig, seed: u64 },
}

impl Mode {
    /// As the config says; a reference copy is kept only when the loss needs one.
    pub fn of(config: &RunConfig) -> Self {
        match &config.training.lora {
            None => Self::Full {
                keep_reference: config.loss.beta > 0.0,
            },
            Some(lora) => Self::Lora {
                config: LoraConfig {
                    r: lora.r as usize,
                    alpha: lora.alpha,
                    targets: lora.target_modules.clone(),
                },
                seed: config.training.seed,
            },
        }
    }

    fn trainable(&self) -> Trainable {
        match self {
            Self::Inference => Trainable::Nothing,
            Self::Full { keep_reference } => Trainable::Full {
                keep_reference: *keep_reference,
            },
            Self::Lora { config, seed } => Trainable::Lora {
                config: config.clone(),
                seed: *seed,
            },
        }
    }
}

/// Sizes of the rollout engine that a caller decides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capacity {
    /// Most sequences decoded at once.
    pub max_batch: usize,
    /// Most tokens of prompt and completion together.
    pub max_model_len: usize,
    /// Tokens the KV pool holds; `None` fits all of `max_batch` up to 2 GiB.
    pub kv_tokens: Option<usize>,
}

/// Weights, tokenizer and engine that belong together.
pub struct Policy {
    pub backend: CpuBackend,
    pub tokenizer: Tokenizer,
    engine: Engine,
    draft: Option<Draft<CpuBackend>>,
    chat: Option<ChatTemplate>,
    mode: Mode,
    /// Model path or hub id, for `adapter_config.json`.
    source: String,
}

impl Policy {
    /// Puts a loaded model onto the device and sizes the engine for it.
    pub fn new(
        model: LoadedModel,
        source: &str,
        mode: Mode,
        gradient_checkpointing: bool,
        capacity: Capacity,
    ) -> anyhow::Result<Self> {
        let LoadedModel {
            spec,
            tensors,
            tokenizer,
        } = model;
        let max_model_len = capacity.max_model_len.min(spec.max_position_embeddings);
        let backend = CpuBackend::new(spec, &tensors, &mode.trainable(), gradient_checkpointing)?;
        let wanted = capacity.max_batch * max_model_len.next_multiple_of(BLOCK_SIZE);
        let affordable = (KV_BYTES / backend.kv_bytes_per_token()).max(max_model_len + BLOCK_SIZE);
        let kv_tokens = capacity.kv_tokens.unwrap_or(wanted.min(affordable));
        backend.check_kv(kv_tokens)?;
        let engine = Engine::new(EngineConfig {
            block_size: BLOCK_SIZE,
            kv_blocks: kv_tokens.div_ceil(BLOCK_SIZE),
            max_batch: capacity.max_batch,
            max_step_tokens: capacity.max_batch + PREFILL_TOKENS,
            enable_prefix_cache: true,
            max_model_len,
        })?;
        let chat = match tokenizer.chat_template_source() {
            Some(_) => Some(tokenizer.chat_template()?),
            None => None,
        };
        Ok(Self {
            backend,
            tokenizer,
            engine,
            draft: None,
            chat,
            mode,
            source: source.to_owned(),
        })
    }

    /// Longest sequence the engine takes, prompt included.
    pub fn max_model_len(&self) -> usize {
        self.engine.config().max_model_len
    }

    /// The prompt as the model sees it: text as is, messages through the model's chat template.
    pub fn render(&self, body: &PromptBody) -> anyhow::Result<String> {
        match body {
            PromptBody::Text(text) => Ok(text.clone()),
            PromptBody::Messages(messages) => self.render_messages(messages),
        }
    }

    fn render_messages(&self, messages: &[Message]) -> anyhow::Result<String> {
        let chat = self.chat.as_ref().with_context(|| {
            format!(
                "the formatter returned chat messages but model `{}` has no chat template",
                self.source
            )
        })?;
        let options = ChatOptions {
            add_generation_prompt: true,
            ..ChatOptions::default()
        };
        Ok(chat.render(messages, &options)?)
    }

    /// Speculates with this draft from now on; nothing may have been generated yet.
    pub fn set_draft(&mut self, draft: Draft<CpuBackend>) {
        self.draft = Some(draft);
    }

    /// What is distilled: a draft model, or an early exit of this one.
    pub fn learning_draft(&mut self) -> Option<(&mut CpuBackend, Exit)> {
        self.draft.as_mut()?.learner_mut(&mut self.backend)
    }

    /// Time the draft has taken so far.
    pub fn drafting_seconds(&self) -> f64 {
        self.draft.as_ref().map_or(0.0, |d| d.spent().as_secs_f64())
    }

    /// Runs all requests to their end.
    pub fn generate(
        &mut self,
        requests: Vec<Request>,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<Vec<Completion>> {
        let completions = self.engine.generate(
            &mut self.backend,
            self.draft.as_mut(),
            &self.tokenizer,
            requests,
            on_progress,
        )?;
        Ok(completions)
    }

    /// Drops cached keys and values. Must follow every optimizer step: they belong to the old weights.
    pub fn forget_kv(&mut self) {
        self.engine.invalidate_prefix_cache();
    }

    /// Writes what trains and the optimizer into a checkpoint folder: a Hugging Face model folder
    /// `model/` for full fine-tuning, a PEFT folder `adapter/` for LoRA, and `optimizer.safetensors`.
    pub fn save_checkpoint(&self, folder: &Path) -> anyhow::Result<()> {
        match &self.mode {
            Mode::Lora { config, .. } => {
                let adapter = make_folder(folder, "adapter")?;
                let tensors = self.backend.export_adapter()?;
                weights::save_adapter(&adapter, config, &self.source, &tensors)?;
            }
            Mode::Full { .. } | Mode::Inference => {
                self.save_model(&make_folder(folder, "model")?)?;
            }
        }
        let optimizer = self.backend.export_optimizer(Exit::Final)?;
        weights::write_safetensors(
            &folder.join("optimizer.safetensors"),
            &optimizer,
            SaveType::F32,
        )?;
        let learnt = self.draft.as_ref().map(Draft::export).unwrap_or_default();
        if !learnt.is_empty() {
            write_numbers(&folder.join(DRAFT_FILE), &learnt)?;
        }
        let draft = self.draft.as_ref();
        if let Some((model, exit)) = draft.and_then(|draft| draft.learner(&self.backend)) {
            let write = |name: &str, tensors: &_| {
                weights::write_safetensors(&folder.join(name), tensors, SaveType::F32)
            };
            write(DRAFT_WEIGHTS, &model.export_trainable(exit)?)?;
            write(DRAFT_OPTIMIZER, &model.export_optimizer(exit)?)?;
        }
        Ok(())
    }

    /// The inverse of [`Policy::save_checkpoint`], onto the model that the run started from.
    pub fn load_checkpoint(&mut self, folder: &Path) -> anyhow::Result<()> {
        let trained = match self.mode {
            Mode::Lora { .. } => weights::load_adapter(&folder.join("adapter"))?.tensors,
            Mode::Full { .. } | Mode::Inference => weights::load(&folder.join("model"))?.tensors,
        };
        self.backend.import(&trained, Exit::Final)?;
        let optimizer = weights::read_safetensors(&folder.join("optimizer.safetensors"))?;
        self.backend.import_optimizer(&optimizer, Exit::Final)?;
        let learnt = folder.join(DRAFT_FILE);
        if let Some(draft) = self.draft.as_mut().filter(|_| learnt.exists()) {
            draft.import(&read_numbers(&learnt)?)?;
        }
        if let Some((model, exit)) = self.learning_draft() {
            let read = |name: &str| weights::read_safetensors(&folder.join(name));
            model.import(&read(DRAFT_WEIGHTS)?, exit)?;
            model.import_optimizer(&read(DRAFT_OPTIMIZER)?, exit)?;
        }
        self.forget_kv();
        Ok(())
    }

    /// The deliverable of a run: `model/`, a folder transformers and vLLM load (adapters merged in),
    /// and `adapter/` beside it for LoRA. A draft that was distilled comes along: a model of its own as
    /// `draft/`, an early exit inside `model/`.
    pub fn export(&self, folder: &Path) -> anyhow::Result<()> {
        if let Mode::Lora { config, .. } = &self.mode {
            let adapter = make_folder(folder, "adapter")?;
            let tensors = self.backend.export_adapter()?;
            weights::save_adapter(&adapter, config, &self.source, &tensors)?;
        }
        let model = make_folder(folder, "model")?;
        self.save_model(&model)?;
        let draft = self.draft.as_ref();
        match draft.and_then(|draft| draft.learner(&self.backend)) {
            None => {}
            Some((draft, Exit::Final)) => {
                let (to, tensors) = (make_folder(folder, "draft")?, draft.export_weights()?);
                weights::save_model(&to, draft.spec(), &tensors, &self.tokenizer, SaveType::F32)?;
            }
            Some((policy, exit @ Exit::Early)) => {
                make_folder(&model, "draft_head")?;
                let to = draft_head_file(&model, policy.early_exit()?.layers());
                weights::write_safetensors(&to, &policy.export_trainable(exit)?, SaveType::F32)?;
            }
        }
        Ok(())
    }

    fn save_model(&self, folder: &Path) -> anyhow::Result<()> {
        let mut tensors = self.backend.export_weights()?;
        if let Mode::Lora { config, .. } = &self.mode {
            tensors = weights::merge(&tensors, &self.backend.export_adapter()?, config)?;
        }
        let spec = self.backend.spec();
        weights::save_model(folder, spec, &tensors, &self.tokenizer, SaveType::F32)?;
        Ok(())
    }
}

/// Little-endian, without a header: the checkpoint's manifest is what makes it whole.
fn write_numbers(path: &Path, numbers: &[u32]) -> anyhow::Result<()> {
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

fn read_numbers(path: &Path) -> anyhow::Result<Vec<u32>> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let (numbers, rest) = bytes.as_chunks::<4>();
    anyhow::ensure!(rest.is_empty(), "{} is cut off", path.display());
    Ok(numbers.iter().map(|n| u32::from_le_bytes(*n)).collect())
}

fn make_folder(parent: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let folder = parent.join(name);
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}
