//! `grpo-host rollout --prompt TEXT`: continue one prompt and say what it cost.

use grpo_policy::types::Request;
use serde_json::json;

use super::progress::downloads;
use crate::{
    cli::{Environment, RolloutArgs},
    placement::{Passes, Place},
    policy::{Mode, Policy},
    setup,
    speculation::Speculation,
    types::{Completion, Message, PromptBody},
};

/// Generates and prints the completions, each with its telemetry.
pub(super) fn run(args: &RolloutArgs, environment: &Environment) -> anyhow::Result<()> {
    let mut config = super::config_over_defaults(|base| args.over(base))?;
    super::use_one_gpu(&mut config);
    super::set_threads(config.hardware.threads)?;
    let model = setup::model(&config, environment, &mut downloads(args.output.quiet))?;
    let capacity = setup::capacity(&config.generation, model.spec.max_position_embeddings);
    let name = setup::model_name(&config);
    let place = Place::of(&config, environment);
    let mut policy = Policy::new(
        model,
        name,
        Mode::Inference,
        Passes::default(),
        capacity,
        &place,
    )?;
    super::attach_draft(&mut policy, &config, environment, args.output.quiet)?;
    let (role, content) = ("user".to_owned(), args.prompt.clone());
    let body = match args.raw {
        true => PromptBody::Text(content),
        false => PromptBody::Messages(vec![Message { role, content }]),
    };
    let text = policy.render(&body)?;
    let mut sampling = config.generation.sampling();
    if args.greedy() {
        sampling.temperature = 0.0;
    }
    let request = Request {
        id: 0,
        prompt: policy.tokenizer.encode_prompt(&text)?,
        n: args.n,
        sampling,
        seed: config.training.seed,
    };
    let completions = policy.generate(vec![request], &mut |_| {})?;
    super::tell_of_fault(&mut policy, &config);
    if args.output.json {
        let objects: Vec<_> = completions.iter().map(json_of).collect();
        outln!("{}", json!({ "prompt": text, "completions": objects }));
        return Ok(());
    }
    for completion in &completions {
        outln!("{}", completion.text);
        if !args.output.quiet {
            outln!("  {}", cost(completion));
        }
    }
    Ok(())
}

fn cost(c: &Completion) -> String {
    let t = &c.telemetry;
    let speculation = Speculation::of(std::iter::once(c)).acceptance();
    let speculation = speculation.map_or_else(String::new, |text| format!(", {text}"));
    format!(
        "[{} tokens, {:?}, {:.0} ms ({:.0} prefill, {:.0} decode), {:.1} tokens/s, prompt {} ({} cached), KV {:.1} KiB{speculation}]",
        t.generated_tokens,
        c.finish,
        t.latency_ms,
        t.prefill_ms,
        t.decode_ms,
        f64::from(t.generated_tokens) / t.latency_ms.max(1e-9) * 1e3,
        t.prompt_tokens,
        t.cached_prompt_tokens,
        t.kv_bytes as f64 / 1024.0,
    )
}

fn json_of(c: &Completion) -> serde_json::Value {
    json!({
        "text": c.text,
        "tokens": c.tokens,
        "logprobs": c.logprobs,
        "finish": c.finish,
        "telemetry": c.telemetry,
        "drafts": c.drafts,
        "accepted_per_pos": c.accepted_per_pos,
    })
}
