//! `grpo-host bench rollout`: tokens per second of the rollout engine, prefill and decoding apart.
//!
//! The definitions are those of `xtask/bench/peer_cpu.py`, so that the two can be compared.

use grpo_policy::{
    backend::cuda::{DecodeShape, Profile},
    types::{Request, SamplingParams},
};
use serde_json::{Value, json};

use super::{
    bench_gpu::{self, Limit, NothingToProfile},
    bench_model::{Measured, best, check_fits, timed},
};
use crate::{
    cli::{BenchRolloutArgs, Environment, GpuArgs},
    config::Device,
    placement::{Capacity, Passes, Place},
    policy::{Mode, Policy},
    rollout::mix,
};

const PROMPT_TOKENS: usize = 128;
const NEW_TOKENS: usize = 64;

/// Far beyond what is decoded at once, and little enough to hold in memory.
const MOST_SEQUENCES: u64 = 65_536;

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
    let mut measured = Measured::load(
        "bench rollout",
        (&args.model, GpuArgs::default()),
        &args.shape,
        args.output,
        environment,
    )?;
    super::use_one_gpu(&mut measured.config);
    let work = workload(args, &measured)?;
    if args.profile && measured.config.hardware.device == Device::Cpu {
        return Err(NothingToProfile.into());
    }
    let Measured {
        name,
        model,
        threads,
        config,
    } = measured;
    let capacity = Capacity {
        max_batch: Some(work.sequences()),
        max_model_len: work.prompt_tokens + work.new_tokens,
        kv_tokens: None,
    };
    let place = Place::of(&config, environment);
    let mut policy = Policy::new(
        model,
        &name,
        Mode::Inference,
        Passes::default(),
        capacity,
        &place,
    )?;
    super::tell_of_device(&policy, args.output.quiet);
    if args.profile && policy.memory_plan().is_none() {
        return Err(NothingToProfile.into());
    }
    let outcome = Outcome::measure(args, &work, &mut policy)?;
    if args.output.json {
        outln!("{}", outcome.json(&work, (&name, threads), &policy));
    } else {
        outln!("    model  {name}, {threads} threads, {}", policy.device());
        outcome.print(&work, args.repeats);
    }
    Ok(())
}

/// What was measured.
struct Outcome {
    /// Seconds of each call.
    whole: Vec<f64>,
    /// Of the calls that end with the first token.
    first: Vec<f64>,
    speed: Speed,
    limit: Option<Limit>,
    profile: Option<Profile>,
}

impl Outcome {
    fn measure(
        args: &BenchRolloutArgs,
        work: &Workload,
        policy: &mut Policy,
    ) -> anyhow::Result<Self> {
        let shape = work.decode_shape();
        let limit = bench_gpu::limit(policy, &shape)?;
        let tokens = work.new_tokens as u32;
        let whole = timed(args.repeats, || work.generate(policy, tokens))?;
        let first = timed(args.repeats, || work.generate(policy, 1))?;
        let profile = match args.profile {
            true => Some(bench_gpu::profile(policy, &shape)?),
            false => None,
        };
        Ok(Self {
            speed: Speed::of(work, &whole, &first),
            whole,
            first,
            limit,
            profile,
        })
    }

    fn json(&self, work: &Workload, (name, threads): (&str, usize), policy: &Policy) -> Value {
        let speed = &self.speed;
        let mut object = json!({
            "name": "rollout", "unit": "tokens/s", "value": speed.whole,
            "decode_only": speed.decoding.map(|d| d.speed), "prefill": speed.prefill,
            "model": name, "batch": work.sequences(), "n": work.n, "prompt_tokens": work.prompt_tokens,
            "new_tokens": work.new_tokens, "threads": threads, "repeats": self.whole.len(),
            "device": policy.device(), "memory": policy.memory_plan(),
            "seconds": self.whole, "seconds_first_token": self.first,
            "step_ms": speed.decoding.map(|d| 1e3 * d.step),
        });
        for (name, value) in Limit::fields(self.limit, speed.decoding.map(|d| d.step)) {
            object[name] = value;
        }
        if let Some(profile) = &self.profile {
            object["profile"] = json!(profile.kernels);
            object["profile_step_us"] = json!(profile.step_us);
        }
        object
    }

    fn print(&self, work: &Workload, repeats: u32) {
        let speed = &self.speed;
        outln!(
            "     work  {} prompts × {} completions × ({} prompt + {} new tokens), best of {repeats}",
            work.prompts.len(),
            work.n,
            work.prompt_tokens,
            work.new_tokens,
        );
        outln!(
            "  prefill  {:.1} tokens/s, {:.1} ms to the first token",
            speed.prefill,
            1e3 * best(&self.first)
        );
        match speed.decoding {
            Some(decoding) => outln!("   decode  {:.1} tokens/s", decoding.speed),
            None => outln!("   decode  too short to be told from the time to the first token"),
        }
        outln!(
            "    whole  {:.1} new tokens/s, {:.2} s",
            speed.whole,
            best(&self.whole)
        );
        if let (Some(limit), Some(decoding)) = (self.limit, speed.decoding) {
            outln!("    limit  {}", limit.line(decoding.step));
        }
        let lines = self.profile.iter().flat_map(bench_gpu::profile_lines);
        lines.for_each(|line| outln!("{line}"));
    }
}

fn workload(args: &BenchRolloutArgs, measured: &Measured) -> anyhow::Result<Workload> {
    let context = measured.context();
    let prompt_tokens = args
        .prompt_tokens
        .map_or(PROMPT_TOKENS.min(context / 2), |n| n as usize);
    let sequences = u64::from(args.prompts) * u64::from(args.n);
    anyhow::ensure!(
        sequences <= MOST_SEQUENCES,
        "--prompts and --n ask for {sequences} sequences; {MOST_SEQUENCES} are the most"
    );
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
    /// All decoded together.
    fn sequences(&self) -> usize {
        self.prompts.len() * self.n as usize
    }

    /// A decoding step with as many tokens in the cache as there are on average.
    fn decode_shape(&self) -> DecodeShape {
        DecodeShape {
            prompts: self.prompts.len(),
            n: self.n as usize,
            prompt_tokens: self.prompt_tokens,
            context: self.prompt_tokens + self.new_tokens / 2,
            longest: self.prompt_tokens + self.new_tokens,
        }
    }

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
    /// Prompt tokens over the time to the first new one.
    prefill: f64,
    /// `None` where the whole call took no longer than one that ends with the first token: so little is noise.
    decoding: Option<Decoding>,
}

/// What comes behind the first token of each sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Decoding {
    /// New tokens but the first, over the whole call less the time to the first.
    speed: f64,
    /// Seconds from one new token of a sequence to the next.
    step: f64,
}

impl Speed {
    fn of(work: &Workload, whole: &[f64], first: &[f64]) -> Self {
        let (batch, whole, first) = (work.sequences(), best(whole), best(first));
        let per = |tokens: usize, seconds: f64| (batch * tokens) as f64 / seconds;
        let decoding = (whole > first).then(|| Decoding {
            speed: per(work.new_tokens - 1, whole - first),
            step: (whole - first) / (work.new_tokens - 1) as f64,
        });
        Self {
            whole: per(work.new_tokens, whole),
            prefill: (work.prompts.len() * work.prompt_tokens) as f64 / first,
            decoding,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORK: Workload = Workload {
        prompts: Vec::new(),
        n: 1,
        prompt_tokens: 128,
        new_tokens: 65,
        seed: 0,
    };

    #[test]
    fn phases_by_hand() {
        let work = Workload {
            prompts: vec![Vec::new(); 8],
            ..WORK
        };
        let speed = Speed::of(&work, &[3.0, 2.5], &[0.75, 0.5]);
        let expected = Speed {
            whole: 8.0 * 65.0 / 2.5,
            prefill: 8.0 * 128.0 / 0.5,
            decoding: Some(Decoding {
                speed: 8.0 * 64.0 / 2.0,
                step: 2.0 / 64.0,
            }),
        };
        assert_eq!(speed, expected);
        assert_eq!(Speed::of(&work, &[0.5], &[0.6]).decoding, None);
    }

    #[test]
    fn the_step_looked_at_is_the_one_in_the_middle() {
        let work = Workload {
            prompts: vec![Vec::new(); 3],
            n: 4,
            ..WORK
        };
        let expected = DecodeShape {
            prompts: 3,
            n: 4,
            prompt_tokens: 128,
            context: 160,
            longest: 193,
        };
        assert_eq!((work.decode_shape(), work.sequences()), (expected, 12));
    }
}
