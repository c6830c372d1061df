//! `grpo-host bench train`: seconds of one optimizer step, forward and backward pass included.
//!
//! The loss is the mean negative log-likelihood of every token but the first, as in
//! `xtask/bench/peer_cpu.py`; GRPO's costs no measurable time beside the passes.

use serde_json::json;

use super::{
    bench_flops::{peak, step_flops},
    bench_gpu::{NothingToProfile, profile_training, training_lines},
    bench_model::{Measured, best, check_fits, timed},
};
use grpo_policy::backend::Backend;

use crate::{
    cli::{BenchTrainArgs, Environment},
    placement::{Capacity, Passes, Place},
    policy::{Mode, Policy},
    sft::{Example, step},
};

const TOKENS: usize = 256;

/// Measures, and prints a table or one JSON object.
pub(super) fn run(args: &BenchTrainArgs, environment: &Environment) -> anyhow::Result<()> {
    let measured = Measured::load(
        "bench train",
        &args.model,
        &args.shape,
        args.output,
        environment,
    )?;
    let context = measured.context();
    let tokens = args.tokens.map_or(TOKENS.min(context), |n| n as usize);
    check_fits(tokens, context, "--tokens")?;
    let sequences = measured.sequences(args.batch, tokens);
    let examples: Vec<Example> = sequences
        .into_iter()
        .map(|ids| Example::new(ids, 1))
        .collect();
    let batch: Vec<&Example> = examples.iter().collect();
    let Measured {
        config,
        name,
        model,
        threads,
    } = measured;
    let checkpointing = config.training.gradient_checkpointing;
    let capacity = Capacity {
        max_batch: Some(1),
        max_model_len: tokens,
        kv_tokens: None,
    };
    let place = Place::of(&config, environment);
    let mode = Mode::of(&config);
    let mut policy = Policy::new(model, &name, mode, Passes::of(&config), capacity, &place)?;
    super::tell_of_device(&policy, args.output.quiet);
    let trainable = policy.backend.trainable_parameters();
    let optimizer = config.optimizer.step(config.optimizer.learning_rate);
    if args.profile && policy.memory_plan().is_none() {
        return Err(NothingToProfile.into());
    }
    let mut losses = Vec::new();
    let samples = timed(args.steps, || {
        let report = step(&mut policy.backend, &batch, &config, &optimizer)?;
        losses.push(report.loss);
        Ok(())
    })?;
    let profile = match args.profile {
        true => Some(profile_training(&mut policy, |backend| {
            step(backend, &batch, &config, &optimizer)?;
            Ok(())
        })?),
        false => None,
    };
    let seconds = best(&samples);
    let speed = (args.batch as usize * tokens) as f64 / seconds;
    let what = match &config.training.lora {
        None => "full".to_owned(),
        Some(lora) => format!("LoRA r={}", lora.r),
    };
    let adapters = config.training.lora.as_ref().map(|_| trainable);
    let sizes = (args.batch as usize, tokens);
    let flops = step_flops(policy.backend.spec(), adapters, sizes) / seconds;
    let mfu = peak(policy.device()).map(|peak| flops / peak);
    let micro_batch_tokens = config.training.micro_batch_tokens;
    if args.output.json {
        let object = json!({
            "name": "train", "unit": "s/step", "value": seconds, "tokens_per_second": speed,
            "model": name, "batch": args.batch, "tokens": tokens,
            "micro_batch_tokens": micro_batch_tokens, "gradient_checkpointing": checkpointing,
            "trains": what, "trainable_parameters": trainable, "threads": threads,
            "steps": args.steps, "seconds": samples, "losses": losses,
            "flops_per_second": flops, "mfu": mfu, "device": policy.device(),
            "memory": policy.memory_plan(), "profile": profile,
        });
        outln!("{object}");
        return Ok(());
    }
    let recompute = if checkpointing { "on" } else { "off" };
    outln!("    model  {name}, {}, {threads} threads", policy.device());
    outln!("   trains  {what}, {trainable} parameters");
    outln!(
        "     work  {} × {tokens} tokens, micro-batches of {micro_batch_tokens}, gradient checkpointing {recompute}, best of {}",
        args.batch,
        args.steps
    );
    outln!("     step  {seconds:.3} s");
    let share = mfu.map_or_else(String::new, |mfu| format!(", {:.1} % MFU", 100.0 * mfu));
    outln!(
        "    speed  {speed:.0} tokens/s, {:.1} TFLOP/s{share}",
        flops / 1e12
    );
    for line in profile.iter().flat_map(|times| training_lines(times)) {
        outln!("{line}");
    }
    Ok(())
}
