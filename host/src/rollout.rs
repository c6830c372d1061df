//! Steps 2 to 6 of the loop: rows → prompts → tokens → completions → reasoning and answer.
//! Shared by training, evaluation and the `rollout` command; scores nothing.

use grpo_policy::engine::Progress;

use crate::{
    plugin::{FormatterPlugin, RowText},
    policy::Policy,
    types::{Completion, Parsed, Prompt, Request, Row, SamplingParams},
};

/// The completions of one prompt.
#[derive(Clone, Debug)]
pub struct Rollouts {
    /// Position in the dataset.
    pub row: u64,
    /// The row as JSON text.
    pub row_json: String,
    /// What the formatter made of the row.
    pub formatted: Prompt,
    /// The same with the chat template applied.
    pub prompt: String,
    pub prompt_ids: Vec<u32>,
    pub completions: Vec<Completion>,
    /// One per completion.
    pub parsed: Vec<Parsed>,
    /// The wave that drew each completion; rewards score a wave in one batch. One per completion.
    pub waves: Vec<u32>,
}

/// Rows to continue, and how many times each.
pub struct Job<'a> {
    /// Counts the jobs of a step.
    pub wave: u32,
    pub rows: Vec<(&'a Row, u32)>,
    pub sampling: &'a SamplingParams,
    /// Prompts longer than this are left out. `None`: what the model's context leaves room for.
    pub max_prompt_tokens: Option<usize>,
    /// All randomness of the job; prompt `i` draws from a stream keyed by `(seed, i)`.
    pub seed: u64,
}

/// Result of a [`Job`], in the order of its rows.
pub struct RolledOut {
    pub rollouts: Vec<Rollouts>,
    /// Rows whose prompt was too long.
    pub too_long: Vec<u64>,
}

/// Why there are no completions, and whose doing it is.
pub enum RollError {
    /// The formatter failed, or made what the model's chat template or tokenizer refuses.
    Formatter(anyhow::Error),
    Engine(anyhow::Error),
}

impl RollError {
    /// The error alone.
    pub fn into_inner(self) -> anyhow::Error {
        match self {
            Self::Formatter(error) | Self::Engine(error) => error,
        }
    }
}

/// Formats, tokenises, generates and parses.
///
/// # Errors
/// Whatever one of the four meets.
pub fn roll(
    policy: &mut Policy,
    formatter: &FormatterPlugin,
    job: &Job<'_>,
    on_progress: &mut dyn FnMut(Progress),
) -> Result<RolledOut, RollError> {
    let Prepared {
        mut rollouts,
        requests,
        too_long,
    } = prepare(policy, formatter, job).map_err(RollError::Formatter)?;
    let completions = policy.generate(requests, on_progress);
    let completions = completions.map_err(RollError::Engine)?;
    let texts: Vec<&str> = completions.iter().map(|c| c.text.as_str()).collect();
    let parsed = formatter.parse(&texts);
    let parsed = parsed.map_err(|e| RollError::Formatter(e.into()))?;
    for (completion, parsed) in completions.into_iter().zip(parsed) {
        let of_prompt = &mut rollouts[completion.request as usize];
        of_prompt.completions.push(completion);
        of_prompt.parsed.push(parsed);
        of_prompt.waves.push(job.wave);
    }
    Ok(RolledOut { rollouts, too_long })
}

/// A job up to the engine: request `i` continues `rollouts[i]`.
struct Prepared {
    rollouts: Vec<Rollouts>,
    requests: Vec<Request>,
    too_long: Vec<u64>,
}

fn prepare(
    policy: &Policy,
    formatter: &FormatterPlugin,
    job: &Job<'_>,
) -> anyhow::Result<Prepared> {
    let json: Vec<String> = job
        .rows
        .iter()
        .map(|(row, _)| serde_json::to_string(&row.json))
        .collect::<Result<_, _>>()?;
    let texts: Vec<RowText<'_>> = job
        .rows
        .iter()
        .zip(&json)
        .map(|((row, _), json)| RowText { id: row.id, json })
        .collect();
    let prompts = formatter.format(&texts)?;
    // One token must be left to sample.
    let longest = job
        .max_prompt_tokens
        .unwrap_or(usize::MAX)
        .min(policy.max_model_len() - 1);
    let mut out = Prepared {
        rollouts: Vec::new(),
        requests: Vec::new(),
        too_long: Vec::new(),
    };
    for (((row, n), row_json), prompt) in job.rows.iter().zip(json).zip(prompts) {
        let text = policy.render(&prompt.body)?;
        let ids = policy.tokenizer.encode_prompt(&text)?;
        if ids.len() > longest {
            out.too_long.push(row.id);
            continue;
        }
        let id = out.rollouts.len() as u64;
        let mut sampling = job.sampling.clone();
        sampling.stop.extend(prompt.stop.iter().cloned());
        out.requests.push(Request {
            id,
            prompt: ids.clone(),
            n: *n,
            sampling,
            seed: mix(job.seed, id),
        });
        out.rollouts.push(Rollouts {
            row: row.id,
            row_json,
            formatted: prompt,
            prompt: text,
            prompt_ids: ids,
            completions: Vec::new(),
            parsed: Vec::new(),
            waves: Vec::new(),
        });
    }
    Ok(out)
}

/// A seed for part `part` of something seeded with `seed` (SplitMix64's finaliser).
pub fn mix(seed: u64, part: u64) -> u64 {
    let mut z = seed ^ part.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
