//! The policy of a run: weights on a device with their tokenizer and rollout engine, from whichever
//! source the user named; and its files in a checkpoint folder. Knows no rewards and no rows.

use std::path::{Path, PathBuf};

use anyhow::Context;
use grpo_policy::{
    backend::{AnyBackend, Backend, Exit, cpu::Trainable, cuda::MemoryPlan},
    chat::{ChatOptions, ChatTemplate},
    engine::{
        Progress,
        draft::{Draft, DraftFault, Suffix},
    },
    error::PolicyError,
    tokenizer::Tokenizer,
    types::{Completion, Request},
    weights::{self, LoadedModel, LoraConfig, SaveType},
};

use crate::{
    config::RunConfig,
    placement::{Capacity, Learning, Passes, Place, Share},
    replicas::{Replica, Replicas},
    types::{Message, PromptBody},
};

/// What the draft has learnt, in a checkpoint.
const DRAFT_FILE: &str = "draft.u32";
/// Weights and optimizer of a draft that is distilled, in a checkpoint.
const DRAFT_WEIGHTS: &str = "draft.safetensors";
const DRAFT_OPTIMIZER: &str = "draft_optimizer.safetensors";
/// Why the draft was given up, in a checkpoint made after that.
const DRAFT_FAULT: &str = "draft_fault.json";

/// Where an exported model keeps the head of its early exit. Not beside the weights: vLLM loads every
/// safetensors file that it finds there.
pub fn draft_head_file(model: &Path, layers: usize) -> PathBuf {
    model.join(format!("draft_head/layers-{layers}.safetensors"))
}

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

/// Weights, tokenizer and engine that belong together, once on every device of the run.
pub struct Policy {
    pub replicas: Replicas,
    pub tokenizer: Tokenizer,
    passed_over: Option<PolicyError>,
    fault_told: bool,
    chat: Option<ChatTemplate>,
    mode: Mode,
    /// Model path or hub id, for `adapter_config.json`.
    source: String,
}

impl Policy {
    /// Puts a loaded model onto its devices and sizes an engine for each.
    ///
    /// # Errors
    /// Weights that are not the spec's, a device that cannot be used, memory that does not suffice.
    pub fn new(
        mut model: LoadedModel,
        source: &str,
        mode: Mode,
        passes: Passes,
        capacity: Capacity,
        place: &Place,
    ) -> anyhow::Result<Self> {
        let trainable = mode.trainable();
        let learning = Learning { trainable, passes };
        let trains = learning.trainable != Trainable::Nothing;
        let mut placed = place.put(&mut model, &learning, capacity)?;
        let passed_over = placed
            .first_mut()
            .and_then(|first| first.passed_over.take());
        let tokenizer = model.tokenizer;
        let chat = match tokenizer.chat_template_source() {
            Some(_) => Some(tokenizer.chat_template()?),
            None => None,
        };
        Ok(Self {
            replicas: Replicas::new(placed, trains)?,
            tokenizer,
            passed_over,
            fault_told: false,
            chat,
            mode,
            source: source.to_owned(),
        })
    }

    /// Longest sequence the engine takes, prompt included.
    pub fn max_model_len(&self) -> usize {
        self.replicas.first().engine().config().max_model_len
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

    /// The weights as files get them; those of all replicas are equal.
    pub fn backend(&self) -> &AnyBackend {
        &self.replicas.first().backend
    }

    /// `cpu`, or a GPU as `cuda:0 NVIDIA H200`, of several the first.
    pub fn device(&self) -> &str {
        self.memory_plan().map_or("cpu", |plan| &plan.device)
    }

    /// The same of all, for people: `cuda:0 NVIDIA H200 and 1 more`.
    pub fn devices(&self) -> String {
        match self.replicas.count() {
            1 => self.device().to_owned(),
            n => format!("{} and {} more", self.device(), n - 1),
        }
    }

    /// How the memory of its first GPU is used; `None` on a CPU.
    pub fn memory_plan(&self) -> Option<&MemoryPlan> {
        self.memory_plans().next()
    }

    /// The same of all its GPUs.
    pub fn memory_plans(&self) -> impl Iterator<Item = &MemoryPlan> {
        let shares = self.replicas.iter().filter_map(Replica::share);
        shares.map(|share: &Share| &share.plan)
    }

    /// Why it is on the CPU although a GPU is there and any device was allowed.
    pub fn passed_over(&self) -> Option<&PolicyError> {
        self.passed_over.as_ref()
    }

    /// A draft model on each of the policy's devices.
    ///
    /// # Errors
    /// As for the policy itself.
    pub fn place_drafts(
        &mut self,
        mut model: LoadedModel,
        learning: &Learning,
    ) -> anyhow::Result<Vec<AnyBackend>> {
        if learning.trainable != Trainable::Nothing || self.memory_plan().is_none() {
            model.dequantize()?;
        }
        self.replicas
            .each(|_, replica| Ok(replica.place_draft(&model, learning)?))
    }

    /// Has each replica speculate with its draft from now on; nothing may have been generated yet.
    ///
    /// # Errors
    /// A GPU without room for the draft's keys and values; those of replicas that learn together.
    pub fn set_drafts(
        &mut self,
        drafts: Vec<Draft<AnyBackend>>,
        learns: bool,
    ) -> Result<(), PolicyError> {
        self.replicas.set_drafts(drafts, learns)
    }

    fn draft(&self) -> Option<&Draft<AnyBackend>> {
        self.replicas.first().draft()
    }

    /// Generates without what the draft remembers of earlier completions, and without leaving anything in it: an
    /// evaluation must not profit from the one before, nor training from an evaluation.
    pub fn generate_apart<T>(&mut self, generate: impl FnOnce(&mut Self) -> T) -> T {
        let drafts = self.replicas.iter_mut().filter_map(Replica::draft_mut);
        let learnt: Vec<Suffix> = drafts.map(Draft::take_learnt).collect();
        let generated = generate(self);
        let drafts = self.replicas.iter_mut().filter_map(Replica::draft_mut);
        drafts
            .zip(learnt)
            .for_each(|(draft, learnt)| draft.put_back(learnt));
        generated
    }

    /// Goes on without the draft.
    pub fn give_up_draft(&mut self, fault: DraftFault) {
        self.replicas.give_up_drafts(fault);
    }

    /// Why the draft was given up, for the user to read: once.
    pub fn take_draft_fault(&mut self) -> Option<DraftFault> {
        let fault = self.draft()?.fault();
        let told = std::mem::replace(&mut self.fault_told, fault.is_some());
        fault.filter(|_| !told)
    }

    /// Time the draft has taken so far; of several that work side by side, the longest.
    pub fn drafting_seconds(&self) -> f64 {
        let drafts = self.replicas.iter().filter_map(Replica::draft);
        drafts.map(|d| d.spent().as_secs_f64()).fold(0.0, f64::max)
    }

    /// Runs all requests to their end.
    pub fn generate(
        &mut self,
        requests: Vec<Request>,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<Vec<Completion>> {
        self.replicas
            .generate(&self.tokenizer, requests, on_progress)
    }

    /// Drops cached keys and values. Must follow every optimizer step: they belong to the old weights.
    pub fn forget_kv(&mut self) {
        self.replicas.iter_mut().for_each(Replica::forget_kv);
    }

    /// Writes what trains and the optimizer into a checkpoint folder: a Hugging Face model folder
    /// `model/` for full fine-tuning, a PEFT folder `adapter/` for LoRA, and `optimizer.safetensors`.
    pub fn save_checkpoint(&self, folder: &Path) -> anyhow::Result<()> {
        match &self.mode {
            Mode::Lora { config, .. } => {
                let adapter = make_folder(folder, "adapter")?;
                let tensors = self.backend().export_adapter()?;
                weights::save_adapter(&adapter, config, &self.source, &tensors)?;
            }
            Mode::Full { .. } | Mode::Inference => {
                let model = make_folder(folder, "model")?;
                self.save_model(&model)?;
                self.save_draft_head(&model)?;
            }
        }
        let optimizer = self.backend().export_optimizer(Exit::Final)?;
        weights::write_safetensors(
            &folder.join("optimizer.safetensors"),
            &optimizer,
            SaveType::F32,
        )?;
        let learnt = self.draft().map(Draft::export).unwrap_or_default();
        if !learnt.is_empty() {
            write_numbers(&folder.join(DRAFT_FILE), &learnt)?;
        }
        let draft = self.draft();
        if let Some(fault) = draft.and_then(Draft::fault) {
            let path = folder.join(DRAFT_FAULT);
            std::fs::write(&path, serde_json::to_vec(&fault)?)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        if let Some((model, exit)) = draft.and_then(|draft| draft.learner(self.backend())) {
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
        let optimizer = weights::read_safetensors(&folder.join("optimizer.safetensors"))?;
        self.replicas.each(|_, Replica { backend, .. }| {
            backend.import(&trained, Exit::Final)?;
            Ok(backend.import_optimizer(&optimizer, Exit::Final)?)
        })?;
        let learnt = folder.join(DRAFT_FILE);
        if self.draft().is_some() && learnt.exists() {
            let learnt = read_numbers(&learnt)?;
            let mut drafts = self.replicas.iter_mut().filter_map(Replica::draft_mut);
            drafts.try_for_each(|draft| draft.import(&learnt))?;
        }
        let fault = folder.join(DRAFT_FAULT);
        if fault.exists() {
            let text = std::fs::read(&fault)
                .with_context(|| format!("cannot read {}", fault.display()))?;
            let fault = serde_json::from_slice(&text)
                .with_context(|| format!("{} is damaged", fault.display()))?;
            self.give_up_draft(fault);
        }
        if self.replicas.first_mut().learning_draft().is_some() {
            let read = |name: &str| weights::read_safetensors(&folder.join(name));
            let (trained, optimizer) = (read(DRAFT_WEIGHTS)?, read(DRAFT_OPTIMIZER)?);
            self.replicas.each(|_, replica| {
                if let Some((model, exit)) = replica.learning_draft() {
                    model.import(&trained, exit)?;
                    model.import_optimizer(&optimizer, exit)?;
                }
                Ok(())
            })?;
        }
        self.forget_kv();
        Ok(())
    }

    /// The deliverable of a run: `model/`, a folder transformers and vLLM load (adapters merged in),
    /// and `adapter/` beside it for LoRA. A draft that was distilled comes along as `draft/`, the trained head
    /// of an early exit, from this run or an earlier one, inside `model/`.
    pub fn export(&self, folder: &Path) -> anyhow::Result<()> {
        if let Mode::Lora { config, .. } = &self.mode {
            let adapter = make_folder(folder, "adapter")?;
            let tensors = self.backend().export_adapter()?;
            weights::save_adapter(&adapter, config, &self.source, &tensors)?;
        }
        let model = make_folder(folder, "model")?;
        self.save_model(&model)?;
        self.save_draft_head(&model)?;
        let draft = self.draft();
        if let Some((draft, Exit::Final)) = draft.and_then(|draft| draft.learner(self.backend())) {
            let (to, tensors) = (make_folder(folder, "draft")?, draft.export_weights()?);
            weights::save_model(&to, draft.spec(), &tensors, &self.tokenizer, SaveType::F32)?;
        }
        Ok(())
    }

    /// The head of the early exit into a model folder, where [`draft_head_file`] looks for it. One that is
    /// untrained is nothing to keep, and one that was given up nothing to use.
    fn save_draft_head(&self, model: &Path) -> anyhow::Result<()> {
        let given_up = self.draft().is_some_and(|d| d.fault().is_some());
        if given_up || !self.has_trained_head() {
            return Ok(());
        }
        make_folder(model, "draft_head")?;
        let to = draft_head_file(model, self.backend().early_exit_layers()?);
        let head = self.backend().export_trainable(Exit::Early)?;
        Ok(weights::write_safetensors(&to, &head, SaveType::F32)?)
    }

    /// Whether there is an early exit whose head has learnt something, here or in an earlier run.
    pub fn has_trained_head(&self) -> bool {
        self.backend().has_trained_exit()
    }

    fn save_model(&self, folder: &Path) -> anyhow::Result<()> {
        let mut tensors = self.backend().export_weights()?;
        if let Mode::Lora { config, .. } = &self.mode {
            tensors = weights::merge(&tensors, &self.backend().export_adapter()?, config)?;
        }
        let spec = self.backend().spec();
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
