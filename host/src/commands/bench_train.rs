//! `grpo-host bench train`: seconds of one optimizer step, forward and backward pass included.
//!
//! The loss is the mean negative log-likelihood of every token but the first, as in
//! `xtask/bench/peer_cpu.py`; GRPO's costs no measurable time beside the passes.

use grpo_policy::backend::{Backend, cuda::WorkTime};
use serde_json::{Value, json};

use super::{
    bench_flops::{peak, step_flops},
    bench_gpu::{NothingToProfile, profile_training, training_lines},
    bench_model::{Measured, best, check_fits, timed},
};
use crate::{
    cli::{BenchTrainArgs, Environment},
    config::RunConfig,
    placement::{Capacity, Passes, Place},
    policy::{Mode, Policy},
    replicas::Replicas,
    sft::{Example, step},
};

const TOKENS: usize = 256;

/// Steps that have been measured.
struct Steps {
    /// Of each, after the first.
    seconds: Vec<f64>,
    losses: Vec<f64>,
    /// Where the time of one more goes, if asked.
    profile: Option<Vec<WorkTime>>,
}

/// Measures, and prints a table or one JSON object.
pub(super) fn run(args: &BenchTrainArgs, environment: &Environment) -> anyhow::Result<()> {
    let (model, shape) = ((&args.model, args.gpus), &args.shape);
    let measured = Measured::load("bench train", model, shape, args.output, environment)?;
    let context = measured.context();
    let tokens = args.tokens.map_or(TOKENS.min(context), |n| n as usize);
    check_fits(tokens, context, "--tokens")?;
    let sequences = measured.sequences(args.batch, tokens).into_iter();
    let examples: Vec<Example> = sequences.map(|ids| Example::new(ids, 1)).collect();
    let Measured {
        config,
        name,
        model,
        threads,
    } = measured;
    let capacity = Capacity {
        max_batch: Some(1),
        max_model_len: tokens,
        kv_tokens: None,
    };
    let (place, passes) = (Place::of(&config, environment), Passes::of(&config));
    let mut policy = Policy::new(model, &name, Mode::of(&config), passes, capacity, &place)?;
    super::tell_of_device(&policy, args.output.quiet);
    let steps = measure(args, &config, &mut policy, &examples)?;
    let lines = report(args, &config, &policy, (&steps, tokens));
    if args.output.json {
        let mut object = lines;
        object["model"] = json!(name);
        object["threads"] = json!(threads);
        outln!("{object}");
        return Ok(());
    }
    let devices = policy.devices();
    outln!("    model  {name}, {devices}, {threads} threads");
    print(&lines, args.steps);
    for line in steps.profile.iter().flat_map(|times| training_lines(times)) {
        outln!("{line}");
    }
    Ok(())
}

fn measure(
    args: &BenchTrainArgs,
    config: &RunConfig,
    policy: &mut Policy,
    examples: &[Example],
) -> anyhow::Result<Steps> {
    if args.profile && policy.memory_plan().is_none() {
        return Err(NothingToProfile.into());
    }
    let batch: Vec<&Example> = examples.iter().collect();
    let optimizer = config.optimizer.step(config.optimizer.learning_rate);
    let mut losses = Vec::new();
    let seconds = timed(args.steps, || {
        let report = step(&mut policy.replicas, &batch, config, &optimizer)?;
        losses.push(report.loss);
        Ok(())
    })?;
    let once = |replicas: &mut Replicas| {
        step(replicas, &batch, config, &optimizer)?;
        Ok(())
    };
    let profile = match args.profile {
        true => Some(profile_training(policy, once)?),
        false => None,
    };
    Ok(Steps {
        seconds,
        losses,
        profile,
    })
}

/// What was measured, as the JSON object has it.
fn report(
    args: &BenchTrainArgs,
    config: &RunConfig,
    policy: &Policy,
    (steps, tokens): (&Steps, usize),
) -> Value {
    let seconds = best(&steps.seconds);
    let trainable = policy.backend().trainable_parameters();
    let lora = config.training.lora.as_ref();
    let trains = lora.map_or_else(|| "full".to_owned(), |lora| format!("LoRA r={}", lora.r));
    let sizes = (args.batch as usize, tokens);
    let spec = policy.backend().spec();
    let flops = step_flops(spec, lora.map(|_| trainable), sizes) / seconds;
    let gpus = policy.replicas.count();
    // A GPU decides by what fits.
    let training = policy.memory_plan().and_then(|plan| plan.training);
    let checkpointing = config.training.gradient_checkpointing;
    json!({
        "name": "train", "unit": "s/step", "value": seconds,
        "tokens_per_second": (args.batch as usize * tokens) as f64 / seconds,
        "batch": args.batch, "tokens": tokens,
        "micro_batch_tokens": config.training.micro_batch_tokens,
        "gradient_checkpointing": training.map_or(checkpointing, |plan| plan.recomputed_layers > 0),
        "trains": trains, "trainable_parameters": trainable,
        "steps": args.steps, "seconds": steps.seconds, "losses": steps.losses,
        "flops_per_second": flops, "mfu": peak(policy.device()).map(|peak| flops / peak / gpus as f64),
        "device": policy.device(), "gpus": gpus, "memory": policy.memory_plan(), "profile": steps.profile,
    })
}

/// The same as lines.
fn print(report: &Value, steps: u32) {
    let number = |key: &str| report[key].as_f64().unwrap_or(f64::NAN);
    let text = |key: &str| report[key].as_str().unwrap_or_default();
    outln!(
        "   trains  {}, {} parameters",
        text("trains"),
        report["trainable_parameters"]
    );
    let recompute = match report["gradient_checkpointing"].as_bool() {
        Some(true) => "on",
        _ => "off",
    };
    outln!(
        "     work  {} × {} tokens, micro-batches of {}, gradient checkpointing {recompute}, best of {steps}",
        report["batch"],
        report["tokens"],
        report["micro_batch_tokens"],
    );
    outln!("     step  {:.3} s", number("value"));
    let mfu = report["mfu"].as_f64();
    let share = mfu.map_or_else(String::new, |mfu| format!(", {:.1} % MFU", 100.0 * mfu));
    outln!(
        "    speed  {:.0} tokens/s, {:.2} TFLOP/s{share}",
        number("tokens_per_second"),
        number("flops_per_second") / 1e12
    );
}
