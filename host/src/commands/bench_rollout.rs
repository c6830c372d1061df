//! `grpo-host bench rollout`: tokens per second of the rollout engine, prefill and decoding apart.
//!
//! The definitions are those of `xtask/bench/peer_cpu.py`, so that the two can be compared.

use grpo_policy::types::{Request, SamplingParams};
use serde_json::json;

use super::bench_model::{Measured, best, check_fits, timed};
use crate::{
    cli::{BenchRolloutArgs, Environment},
    placement::{Capacity, Place},
    policy::{Mode, Policy},
    rollout::mix,
};

const PROMPT_TOKENS: usize = 128;
const NEW_TOKENS: usize = 64;

/// What is generated in one call.
struct Workload {
    prompts: Vec<Vec<u32>>,
    /// Completions of each.
    n: u32,
    prompt_tokens: usize,
    new_tokens: usize,
    seed: u64,
}

/// Measures, and prints a table or one JSON object.
pub(super) fn run(args: &BenchRolloutArgs, environment: &Environment) -> anyhow::Result<()> {
    let measured = Measured::load(
        "bench rollout",
        &args.model,
        &args.shape,
        args.output,
        environment,
    )?;
    let work = workload(args, &measured)?;
    let total = work.prompt_tokens + work.new_tokens;
    let Measured {
        name,
        model,
        threads,
        config,
    } = measured;
    let sequences = args.prompts as usize * args.n as usize;
    let capacity = Capacity {
        max_batch: Some(sequences),
        max_model_len: total,
        kv_tokens: None,
    };
    let place = Place::of(&config, environment);
    let mut policy = Policy::new(model, &name, Mode::Inference, false, capacity, &place)?;
    super::tell_of_device(&policy, args.output.quiet);
    let whole = timed(args.repeats, || {
        work.generate(&mut policy, work.new_tokens as u32)
    })?;
    let first = timed(args.repeats, || work.generate(&mut policy, 1))?;
    let speed = Speed::of(sequences, &work, &whole, &first);
    if args.output.json {
        let object = json!({
            "name": "rollout", "unit": "tokens/s", "value": speed.whole,
            "decode_only": speed.decode, "prefill": speed.prefill,
            "model": name, "batch": sequences, "n": args.n, "prompt_tokens": work.prompt_tokens,
            "new_tokens": work.new_tokens, "threads": threads, "repeats": args.repeats,
            "device": policy.device(), "memory": policy.memory_plan(),
            "seconds": whole, "seconds_first_token": first,
        });
        outln!("{object}");
        return Ok(());
    }
    outln!("    model  {name}, {threads} threads, {}", policy.device());
    outln!(
        "     work  {} prompts × {} completions × ({} prompt + {} new tokens), best of {}",
        args.prompts,
        args.n,
        work.prompt_tokens,
        work.new_tokens,
        args.repeats
    );
    outln!("  prefill  {:.1} tokens/s", speed.prefill);
    outln!("   decode  {:.1} tokens/s", speed.decode);
    outln!(
        "    whole  {:.1} new tokens/s, {:.2} s",
        speed.whole,
        best(&whole)
    );
    Ok(())
}

fn workload(args: &BenchRolloutArgs, measured: &Measured) -> anyhow::Result<Workload> {
    let context = measured.context();
    let prompt_tokens = args
        .prompt_tokens
        .map_or(PROMPT_TOKENS.min(context / 2), |n| n as usize);
    let left = context.saturating_sub(prompt_tokens).max(2);
    let new_tokens = args.new_tokens.map_or(NEW_TOKENS.min(left), |n| n as usize);
    check_fits(
        prompt_tokens + new_tokens,
        context,
        "--prompt-tokens and --new-tokens",
    )?;
    Ok(Workload {
        prompts: measured.sequences(args.prompts, prompt_tokens),
        n: args.n,
        prompt_tokens,
        new_tokens,
        seed: measured.config.training.seed,
    })
}

impl Workload {
    /// All prompts continued by `tokens` tokens, with no key or value left over from the last call.
    fn generate(&self, policy: &mut Policy, tokens: u32) -> anyhow::Result<()> {
        let sampling = SamplingParams {
            max_tokens: tokens,
            ignore_eos: true,
            ..SamplingParams::default()
        };
        let requests = self.prompts.iter().zip(0..).map(|(prompt, id)| Request {
            id,
            prompt: prompt.clone(),
            n: self.n,
            sampling: sampling.clone(),
            seed: mix(self.seed, id),
        });
        policy.forget_kv();
        let completions = policy.generate(requests.collect(), &mut |_| {})?;
        let made: usize = completions.iter().map(|c| c.tokens.len()).sum();
        let wanted = self.prompts.len() * self.n as usize * tokens as usize;
        anyhow::ensure!(
            made == wanted,
            "{made} tokens were made instead of {wanted}"
        );
        Ok(())
    }
}

/// Tokens per second of the best calls.
#[derive(Debug, PartialEq)]
struct Speed {
    /// New tokens over the whole call.
    whole: f64,
    /// New tokens but the first, over the whole call less the time to the first.
    decode: f64,
    /// Prompt tokens over the time to the first new one.
    prefill: f64,
}

impl Speed {
    fn of(batch: usize, work: &Workload, whole: &[f64], first: &[f64]) -> Self {
        let (whole, first) = (best(whole), best(first));
        let per = |tokens: usize, seconds: f64| (batch * tokens) as f64 / seconds;
        Self {
            whole: per(work.new_tokens, whole),
            decode: per(work.new_tokens - 1, whole - first),
            prefill: (work.prompts.len() * work.prompt_tokens) as f64 / first,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_by_hand() {
        let work = Workload {
            prompts: vec![Vec::new(); 8],
            n: 1,
            prompt_tokens: 128,
            new_tokens: 65,
            seed: 0,
        };
        let speed = Speed::of(8, &work, &[3.0, 2.5], &[0.75, 0.5]);
        let expected = Speed {
            whole: 8.0 * 65.0 / 2.5,
            decode: 8.0 * 64.0 / 2.0,
            prefill: 8.0 * 128.0 / 0.5,
        };
        assert_eq!(speed, expected);
    }
}
