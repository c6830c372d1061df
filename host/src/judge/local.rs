//! A judge in this process: a model of ours on the CPU, frozen, greedy, through its chat template.
//!
//! Generation cannot be called off in the middle. The deadline is looked at between batches of `concurrency` questions, so
//! an answer may come that much late.

use std::time::Instant;

use grpo_policy::{backend::Backend, weights::LoadedModel};

use super::{JudgeError, Ledger, Reply, Request, Tell, cache, refuse_empty};
use crate::{
    config::{Device, JudgeConfig, QuantizedWeights},
    draft::digest,
    error::one_line,
    placement::{Capacity, Passes, Place},
    policy::{Mode, Policy},
    types::{Completion, PromptBody, Request as Prompt, SamplingParams},
};

/// Longest question and answer together, tokens. Models with a larger context would take memory for what nobody asks.
const MOST_CONTEXT: usize = 8192;

/// See the file header.
pub(super) struct Local {
    policy: Policy,
    /// Of the weights, for the names of answers.
    digest: String,
    at_once: usize,
    memory: String,
}

/// What a request is to the model: token ids, and most tokens of the answer.
pub(super) type Rendered = (Vec<u32>, u32);

impl Local {
    /// Puts a model onto the CPU.
    ///
    /// # Errors
    /// Those of [`Policy::new`].
    pub(super) fn new(
        judge: &str,
        mut model: LoadedModel,
        config: &JudgeConfig,
    ) -> anyhow::Result<Self> {
        model.dequantize()?;
        let digest = digest(&model.tensors)?;
        let at_once = config.concurrency as usize;
        let capacity = Capacity {
            max_batch: Some(at_once),
            max_model_len: model.spec.max_position_embeddings.min(MOST_CONTEXT),
            kv_tokens: None,
        };
        let place = Place {
            device: Device::Cpu,
            replicas: 1,
            gpu_memory_utilization: 0.0,
            cache: None,
            deterministic: false,
            quantized_weights: QuantizedWeights::Auto,
        };
        let passes = Passes::default();
        let policy = Policy::new(
            model,
            &config.model,
            Mode::Inference,
            passes,
            capacity,
            &place,
        )?;
        let engine = policy.replicas.first().engine().config();
        let tokens = engine.kv_blocks * engine.block_size;
        let gib = |bytes: usize| bytes as f64 / (1_u64 << 30) as f64;
        let memory = format!(
            "judge `{judge}`: `{}` runs here on the CPU; {:.2} GiB of weights, and up to {:.2} GiB of keys and values",
            config.model,
            gib(policy.backend().parameters() * size_of::<f32>()),
            gib(policy.backend().kv_bytes_per_token() * tokens),
        );
        Ok(Self {
            policy,
            digest,
            at_once,
            memory,
        })
    }

    /// What it takes, for the user to read.
    pub(super) fn memory(&self) -> String {
        self.memory.clone()
    }

    /// Requests as the model sees them, and the names of their answers. A request that has none is an empty prompt.
    pub(super) fn prompts(
        &self,
        requests: &[Request<'_>],
    ) -> (Vec<Rendered>, Vec<Result<String, JudgeError>>) {
        let render = |request: &Request<'_>| match self.render(request) {
            Ok(ids) => {
                let text: Vec<String> = ids.iter().map(u32::to_string).collect();
                let max_tokens = request.max_tokens.to_string();
                let key = cache::key(&["local", &self.digest, &text.join(" "), &max_tokens]);
                ((ids, request.max_tokens), Ok(key))
            }
            Err(error) => ((Vec::new(), 0), Err(error)),
        };
        requests.iter().map(render).unzip()
    }

    fn render(&self, request: &Request<'_>) -> Result<Vec<u32>, JudgeError> {
        refuse_empty(request)?;
        let refuse = |error: anyhow::Error| JudgeError::Refused(one_line(&format!("{error:#}")));
        let body = PromptBody::Messages(request.messages.to_vec());
        let text = self.policy.render(&body).map_err(refuse)?;
        let ids = self.policy.tokenizer.encode_prompt(&text);
        let ids = ids.map_err(|error| refuse(error.into()))?;
        let most = self.policy.max_model_len() - 1;
        if ids.len() > most {
            let why = format!("a question of {} tokens; {most} fit", ids.len());
            return Err(JudgeError::Refused(why));
        }
        Ok(ids)
    }

    /// Answers the prompts at `places`, and tells of each answer.
    pub(super) fn ask(
        &mut self,
        prompts: &[Rendered],
        places: &[usize],
        deadline: Instant,
        ledger: &Ledger,
        tell: Tell<'_, Reply>,
    ) {
        // Answers must not depend on what was asked before.
        self.policy.forget_kv();
        for places in places.chunks(self.at_once) {
            if Instant::now() >= deadline {
                // What is not told of has not been answered in time.
                return;
            }
            let (mut requests, mut reserved) = (Vec::new(), Vec::new());
            for place in places {
                let (prompt, max_tokens) = &prompts[*place];
                let most = prompt.len() as u64 + u64::from(*max_tokens);
                match ledger.reserve(most, false) {
                    Ok(reservation) => reserved.push((*place, reservation)),
                    Err(error) => {
                        tell(*place, Err(error));
                        continue;
                    }
                }
                let sampling = SamplingParams {
                    temperature: 0.0,
                    max_tokens: *max_tokens,
                    ..SamplingParams::default()
                };
                requests.push(Prompt {
                    id: requests.len() as u64,
                    prompt: prompt.clone(),
                    n: 1,
                    sampling,
                    seed: 0,
                });
            }
            let generated = self.policy.generate(requests, &mut |_| {});
            match generated {
                Ok(mut completions) => {
                    completions.sort_by_key(|completion| completion.request);
                    for ((place, reservation), completion) in reserved.into_iter().zip(completions)
                    {
                        let reply = reply(prompts[place].0.len(), completion);
                        let (prompt, answer) = (reply.prompt_tokens, reply.completion_tokens);
                        reservation.settle(u64::from(prompt), u64::from(answer));
                        tell(place, Ok(reply));
                    }
                }
                Err(error) => {
                    let why = one_line(&format!("{error:#}"));
                    for (place, _) in reserved {
                        tell(place, Err(JudgeError::Unavailable(why.clone())));
                    }
                }
            }
        }
    }
}

fn reply(prompt_tokens: usize, completion: Completion) -> Reply {
    Reply {
        prompt_tokens: prompt_tokens as u32,
        completion_tokens: completion.tokens.len() as u32,
        finish: completion.finish,
        text: completion.text,
    }
}
