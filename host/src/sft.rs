//! Supervised fine-tuning: next-token loss on the completions of prompt and answer rows, through the
//! same backward pass and optimizer as GRPO.

use anyhow::Context;
use grpo_policy::{
    backend::{AnyBackend, Backend, Exit, OptimStep, Pass},
    types::PackedBatch,
};

use crate::{
    config::RunConfig,
    plugin::{FormatterPlugin, RowText},
    policy::Policy,
    replicas::{Replicas, divide},
    rollout::mix,
    types::Row,
};

/// A row as tokens.
#[derive(Clone, Debug)]
pub struct Example {
    ids: Vec<u32>,
    /// Tokens before this one are the prompt, and not learned.
    prompt: usize,
}

impl Example {
    /// Token ids of which the first `prompt` are not learned; at least one is learned, and not the first.
    pub fn new(ids: Vec<u32>, prompt: usize) -> Self {
        Self { ids, prompt }
    }
}

/// Tokenised rows.
pub struct Examples {
    pub examples: Vec<Example>,
    /// Rows left out because they do not fit the context.
    pub too_long: usize,
}

/// Formats and tokenises: prompt, answer, end of text.
pub fn examples(
    policy: &Policy,
    formatter: &FormatterPlugin,
    rows: &[Row],
    answer_column: &str,
) -> anyhow::Result<Examples> {
    let json: Vec<String> = rows
        .iter()
        .map(|row| serde_json::to_string(&row.json))
        .collect::<Result<_, _>>()?;
    let texts: Vec<RowText<'_>> = rows
        .iter()
        .zip(&json)
        .map(|(row, json)| RowText { id: row.id, json })
        .collect();
    let end = policy.tokenizer.eos_ids().first().copied();
    let mut out = Examples {
        examples: Vec::new(),
        too_long: 0,
    };
    for (row, prompt) in rows.iter().zip(formatter.format(&texts)?) {
        let answer = row
            .json
            .get(answer_column)
            .and_then(|v| v.as_str())
            .with_context(|| {
                let found = row
                    .json
                    .keys()
                    .map(String::as_str)
                    .collect::<Vec<_>>()
                    .join(", ");
                format!(
                    "row {} has no text column `{answer_column}`; it has {found}",
                    row.id
                )
            })?;
        let mut ids = policy
            .tokenizer
            .encode_prompt(&policy.render(&prompt.body)?)?;
        let prompt = ids.len();
        ids.extend(policy.tokenizer.encode(answer, false)?);
        ids.extend(end);
        if ids.len() > policy.max_model_len() || ids.len() == prompt {
            out.too_long += 1;
        } else {
            out.examples.push(Example::new(ids, prompt));
        }
    }
    anyhow::ensure!(
        !out.examples.is_empty(),
        "no row fits into the model's context"
    );
    Ok(out)
}

/// Batches of one pass after another, each in an order of its own.
pub struct Batches<'a> {
    examples: &'a [Example],
    seed: u64,
}

impl<'a> Batches<'a> {
    pub fn new(examples: &'a [Example], seed: u64) -> Self {
        Self { examples, seed }
    }

    /// The examples of batch `step`, a function of seed and step alone.
    pub fn batch(&self, step: u64, size: usize) -> Vec<&'a Example> {
        let n = self.examples.len() as u64;
        let first = step * size as u64;
        let mut order: Option<(u64, Vec<u64>)> = None;
        let mut pick = |index: u64| {
            let epoch = index / n;
            if order.as_ref().is_none_or(|(e, _)| *e != epoch) {
                let mut shuffled: Vec<u64> = (0..n).collect();
                shuffled.sort_by_cached_key(|i| mix(mix(self.seed, epoch), *i));
                order = Some((epoch, shuffled));
            }
            let shuffled = order.as_ref().map(|(_, o)| o[(index % n) as usize]);
            &self.examples[shuffled.unwrap_or(0) as usize]
        };
        (first..first + size as u64).map(&mut pick).collect()
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug)]
pub struct SftReport {
    /// Mean negative log-likelihood of an answer token, nats.
    pub loss: f64,
    pub grad_norm: f64,
    /// Tokens through the model, prompts included.
    pub tokens: usize,
}

/// One optimizer step on a batch, in micro-batches; replicas have a share of it each.
///
/// # Errors
/// Those of the passes and of the optimizer.
pub fn step(
    replicas: &mut Replicas,
    batch: &[&Example],
    config: &RunConfig,
    optimizer: &OptimStep,
) -> anyhow::Result<SftReport> {
    let answers: usize = batch.iter().map(|e| e.ids.len() - e.prompt).sum();
    let weight = 1.0 / answers as f64;
    let limit = config.training.micro_batch_tokens as usize;
    let sizes: Vec<usize> = batch.iter().map(|e| e.ids.len()).collect();
    let shares = divide(&sizes, replicas.count());
    let reports = replicas.each(|rank, replica| {
        let share = &batch[shares[rank].clone()];
        step_share(&mut replica.backend, (share, weight), limit, optimizer)
    })?;
    let sum = reports.into_iter().reduce(|all, part| SftReport {
        loss: all.loss + part.loss,
        tokens: all.tokens + part.tokens,
        ..all
    });
    sum.context("a step without a device")
}

/// A replica's part in a step. Without examples it has no gradients but those of the others.
fn step_share(
    backend: &mut AnyBackend,
    (share, weight): (&[&Example], f64),
    limit: usize,
    optimizer: &OptimStep,
) -> anyhow::Result<SftReport> {
    let mut report = SftReport {
        loss: 0.0,
        grad_norm: 0.0,
        tokens: 0,
    };
    let mut packed = PackedBatch::default();
    for (i, example) in share.iter().enumerate() {
        packed.push(&example.ids, example.prompt);
        let next = share.get(i + 1).map(|e| e.ids.len());
        if next.is_none_or(|n| packed.ids.len() + n > limit) {
            let scores = backend.score(&packed, 1.0, Pass::Train)?;
            let sum: f64 = scores.logprobs.iter().map(|l| f64::from(*l)).sum();
            if next.is_none() {
                backend.expect_update();
            }
            backend.backward(&vec![-weight as f32; scores.logprobs.len()])?;
            report.loss -= weight * sum;
            report.tokens += packed.ids.len();
            packed = PackedBatch::default();
        }
    }
    report.grad_norm = backend.optimizer_step(optimizer, Exit::Final)?;
    Ok(report)
}
