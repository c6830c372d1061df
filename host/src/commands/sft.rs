//! `grpo-host sft`: supervised fine-tuning of a model, or of a new one from random weights.

use std::{path::Path, time::Instant};

use anyhow::Context;
use grpo_policy::{
    backend::OptimStep,
    spec::ModelSpec,
    tokenizer::{Tokenizer, TokenizerFiles},
    weights::{LoadedModel, Quantized, random_weights},
};
use serde_json::json;

use super::guest_log::guest_log;
use super::progress::{SftBar, downloads};
use crate::{
    cli::{Environment, SftArgs},
    config::RunConfig,
    placement::{Passes, Place},
    policy::{Mode, Policy},
    setup,
    sft::{Batches, examples, step},
};

/// Trains, writes the model, prints a short table or one JSON object.
pub(super) fn run(args: &SftArgs, environment: &Environment) -> anyhow::Result<()> {
    let config = super::config_without_draft("sft", |base| args.over(base))?;
    super::set_threads(config.hardware.threads)?;
    anyhow::ensure!(!args.out.exists(), "{} exists already", args.out.display());
    let mut on_download = downloads(args.output.quiet);
    let part = setup::Part {
        split: &config.input.data_split,
        subset: config.input.data_subset.as_deref(),
    };
    let data = setup::dataset(&args.data, part, &config, environment, &mut on_download)?;
    let model = match (&args.init_shape, &args.tokenizer) {
        (Some(shape), Some(tokenizer)) => new_model(shape, tokenizer, config.training.seed)?,
        _ => setup::model(&config, environment, &mut on_download)?,
    };
    let capacity = setup::capacity(&config.generation, model.spec.max_position_embeddings);
    let name = setup::model_name(&config);
    let place = Place::of(&config, environment);
    let mode = Mode::of(&config);
    let mut policy = Policy::new(model, name, mode, Passes::of(&config), capacity, &place)?;
    super::tell_of_device(&policy, args.output.quiet);
    let formatter = setup::plugins(&config, environment, guest_log())?.formatter;
    let rows = examples(&policy, &formatter, &data.rows, &args.answer_column)?;
    let started = Instant::now();
    let bar = SftBar::new(args.steps, args.output.quiet);
    let batches = Batches::new(&rows.examples, config.training.seed);
    let (mut first, mut last, mut tokens) = (None, None, 0);
    for number in 0..args.steps {
        let batch = batches.batch(number, args.batch as usize);
        let optimizer = optimizer(&config, number);
        let report = step(&mut policy.replicas, &batch, &config, &optimizer)?;
        bar.step(number + 1, &report);
        first = first.or(Some(report.loss));
        last = Some(report.loss);
        tokens += report.tokens;
    }
    bar.finish();
    policy.export(&args.out)?;
    let wall_s = started.elapsed().as_secs_f64();
    let speed = tokens as f64 / wall_s.max(1e-9);
    if args.output.json {
        let object = json!({
            "steps": args.steps, "loss_first": first, "loss_last": last, "tokens_per_second": speed,
            "wall_s": wall_s, "rows": rows.examples.len(), "too_long": rows.too_long, "out": args.out,
        });
        outln!("{object}");
    } else {
        let number = |x: Option<f64>| x.map_or("–".to_owned(), |x| format!("{x:.4}"));
        outln!("     loss  {} → {}", number(first), number(last));
        outln!(
            "     rows  {} ({} too long)",
            rows.examples.len(),
            rows.too_long
        );
        outln!("    speed  {speed:.0} tokens/s, {wall_s:.1} s");
        outln!("    model  {}", args.out.join("model").display());
    }
    Ok(())
}

fn optimizer(config: &RunConfig, step: u64) -> OptimStep {
    let settings = &config.optimizer;
    let total = config.training.max_steps;
    let factor = settings
        .lr_scheduler_type
        .factor(step, total, settings.warmup_steps);
    settings.step(settings.learning_rate * factor)
}

/// A model of the shape in a `config.json` with random weights.
fn new_model(shape: &Path, tokenizer: &Path, seed: u64) -> anyhow::Result<LoadedModel> {
    let read = |path: &Path| {
        std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let config = read(shape)?;
    let spec = ModelSpec::from_config_json(&config, shape)?;
    let tokenizer = Tokenizer::from_files(&TokenizerFiles {
        tokenizer: &read(&tokenizer.join("tokenizer.json"))?,
        tokenizer_config: Some(&read(&tokenizer.join("tokenizer_config.json"))?),
        config: Some(&config),
        ..TokenizerFiles::default()
    })?;
    let tensors = random_weights(&spec, seed)?;
    Ok(LoadedModel {
        spec,
        tensors,
        quantized: Quantized::new(),
        tokenizer,
    })
}
