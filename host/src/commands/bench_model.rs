//! What `bench rollout` and `bench train` share: the model they measure, made-up tokens for it, and
//! timing. Knows neither what is measured nor how it is printed.

use std::{path::Path, time::Instant};

use anyhow::Context;
use grpo_policy::{
    spec::ModelSpec,
    weights::{LoadedModel, Quantized, random_weights},
};

use super::progress::downloads;
use crate::{
    cli::{Environment, GpuArgs, ModelArgs, OutputArgs, ShapeArgs},
    config::RunConfig,
    defaults,
    rollout::mix,
    setup,
};

/// Ids below this are special tokens in most vocabularies.
const FIRST_PLAIN: u64 = 10;

/// A model to measure, with what was configured for it.
pub(super) struct Measured {
    pub(super) config: RunConfig,
    pub(super) name: String,
    pub(super) model: LoadedModel,
    pub(super) threads: usize,
}

impl Measured {
    /// The model that the flags name, or random weights in a shape, for `command`.
    pub(super) fn load(
        command: &str,
        (args, gpus): (&ModelArgs, GpuArgs),
        shape: &ShapeArgs,
        output: OutputArgs,
        environment: &Environment,
    ) -> anyhow::Result<Self> {
        let config = super::config_without_draft(command, |base| gpus.over(args.over(base)?))?;
        super::set_threads(config.hardware.threads)?;
        let cores = std::thread::available_parallelism()?.get();
        let (name, model) = match &shape.shape {
            Some(file) => {
                let text = shape_text(file)?;
                let spec = ModelSpec::from_config_json(&text, file)?;
                let model = LoadedModel {
                    tensors: random_weights(&spec, config.training.seed)?,
                    quantized: Quantized::new(),
                    // Only turns ids into text here, and leaves out those that it does not know.
                    tokenizer: defaults::model()?.tokenizer,
                    spec,
                };
                (format!("random weights, {}", file.display()), model)
            }
            None => {
                let mut on_download = downloads(output.quiet);
                let model = setup::model(&config, environment, &mut on_download)?;
                (setup::model_name(&config).to_owned(), model)
            }
        };
        let threads = config.hardware.threads.map_or(cores, |n| n as usize);
        Ok(Self {
            config,
            name,
            model,
            threads,
        })
    }

    /// `count` sequences of `tokens` tokens, a function of the seed.
    pub(super) fn sequences(&self, count: u32, tokens: usize) -> Vec<Vec<u32>> {
        let vocab = self.model.spec.vocab_size as u64;
        sequences(vocab, self.config.training.seed, count, tokens)
    }

    /// Longest sequence the model takes.
    pub(super) fn context(&self) -> usize {
        self.model.spec.max_position_embeddings
    }
}

fn sequences(vocab: u64, seed: u64, count: u32, tokens: usize) -> Vec<Vec<u32>> {
    let first = FIRST_PLAIN.min(vocab.saturating_sub(1));
    let ids = (vocab - first).max(1);
    let id = |row, at| (first + mix(mix(seed, row), at) % ids) as u32;
    (0..u64::from(count))
        .map(|row| (0..tokens as u64).map(|at| id(row, at)).collect())
        .collect()
}

/// Shapes that have a name. Contexts are cut to what a rollout needs.
const SHAPES: [(&str, &str); 4] = [
    ("qwen2.5-0.5b", include_str!("shapes/qwen2.5-0.5b.json")),
    ("qwen2.5-1.5b", include_str!("shapes/qwen2.5-1.5b.json")),
    ("qwen3-0.6b", include_str!("shapes/qwen3-0.6b.json")),
    ("smollm2-135m", include_str!("shapes/smollm2-135m.json")),
];

/// The `config.json` behind a name or a path.
fn shape_text(file: &Path) -> anyhow::Result<Vec<u8>> {
    if let Some((_, text)) = SHAPES.iter().find(|(name, _)| file == Path::new(name)) {
        return Ok(text.as_bytes().to_vec());
    }
    let names: Vec<&str> = SHAPES.iter().map(|(name, _)| *name).collect();
    std::fs::read(file).with_context(|| {
        format!(
            "cannot read {} (shapes with a name: {})",
            file.display(),
            names.join(", ")
        )
    })
}

/// Refuses sequences that the model does not take.
pub(super) fn check_fits(tokens: usize, context: usize, flags: &str) -> anyhow::Result<()> {
    anyhow::ensure!(
        tokens <= context,
        "{flags} ask for sequences of {tokens} tokens; the model's context is {context}"
    );
    Ok(())
}

/// Seconds of each of `repeats` calls, after one that is not counted.
pub(super) fn timed(
    repeats: u32,
    mut call: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Vec<f64>> {
    call()?;
    (0..repeats)
        .map(|_| {
            let begun = Instant::now();
            call()?;
            Ok(begun.elapsed().as_secs_f64())
        })
        .collect()
}

/// The shortest; noise only ever adds time.
pub(super) fn best(seconds: &[f64]) -> f64 {
    seconds.iter().copied().fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_call_is_not_timed_and_the_shortest_counts() {
        let mut calls = 0;
        let seconds = timed(3, || {
            calls += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!((calls, seconds.len()), (4, 3));
        assert_eq!(best(&[0.5, 0.25, 0.75]), 0.25);
    }

    #[test]
    fn made_up_tokens_are_in_the_vocabulary_and_depend_on_the_seed() {
        let rows = sequences(263, 1, 4, 50);
        let ids: Vec<u32> = rows.concat();
        assert_eq!(ids.len(), 200);
        assert!(ids.iter().all(|id| (10..263).contains(id)));
        assert_ne!(rows[0], rows[1]);
        assert_eq!(rows, sequences(263, 1, 4, 50));
        assert_ne!(rows, sequences(263, 2, 4, 50));
        assert_eq!(sequences(1, 1, 1, 2), [[0, 0]]);
    }

    #[test]
    fn sequences_longer_than_the_context_are_refused() {
        assert!(check_fits(128, 128, "--tokens").is_ok());
        assert_eq!(
            check_fits(129, 128, "--tokens").unwrap_err().to_string(),
            "--tokens ask for sequences of 129 tokens; the model's context is 128"
        );
    }
}
