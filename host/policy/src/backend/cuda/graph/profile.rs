//! Where the time of a decoding step goes: each part of it captured in a graph of its own and replayed, and the step as a
//! whole beside them.
//!
//! By the host's clock, because the driver's event timer has another name in CUDA 12 than the one bound here. A part is timed
//! behind another that keeps the GPU busy, so that the host is never what is waited for, and that leaves in the cache what
//! the part would find there in a real step: without it, weights that are read again and again would come from the cache.

use std::time::Instant;

use cudarc::driver::CudaGraph;
use serde::Serialize;

use super::{MAX_BURST, bucket};
use crate::{
    backend::{
        BlockId, SampleArgs, StepRow,
        cuda::{
            BLOCK_SIZE, CudaBackend, CudaError, forward::PassArgs, inputs::Counts, parts::Part,
            siblings::Siblings, step::Sampling,
        },
    },
    error::PolicyError,
    types::SamplingParams,
};

/// The fastest counts.
const ROUNDS: usize = 8;

/// The decoding step to look at: `prompts` × `n` sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeShape {
    pub prompts: usize,
    /// Sequences of each prompt, which share its blocks.
    pub n: usize,
    pub prompt_tokens: usize,
    /// Tokens in the cache of each sequence, less where the longest sequence does not leave room for a few more.
    pub context: usize,
    /// Tokens of the longest sequence, at least 2.
    pub longest: usize,
}

/// What one kind of kernel takes of a decoding step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KernelTime {
    /// Its name; in the last row, what the step as a whole takes beyond its parts: gaps between kernels if positive,
    /// their overlap if negative.
    pub kernel: &'static str,
    /// In a step. `None` in the last row, as `us_each`.
    pub launches: Option<usize>,
    /// Microseconds of one.
    pub us_each: Option<f64>,
    /// Microseconds of a step.
    pub us_step: f64,
    /// Of the step.
    pub share: f64,
}

/// A decoding step by kernels.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Microseconds of the step, without the host.
    pub step_us: f64,
    /// Longest first; what is left between them and the step comes last.
    pub kernels: Vec<KernelTime>,
}

impl Profile {
    /// `parts`: name, launches and microseconds of each.
    fn of(step_us: f64, parts: &[(&'static str, usize, f64)]) -> Self {
        let mut kernels: Vec<KernelTime> = parts
            .iter()
            .map(|&(kernel, launches, us)| KernelTime {
                kernel,
                launches: Some(launches),
                us_each: Some(us / launches as f64),
                us_step: us,
                share: us / step_us,
            })
            .collect();
        kernels.sort_by(|a, b| b.us_step.total_cmp(&a.us_step));
        let rest = step_us - parts.iter().map(|part| part.2).sum::<f64>();
        kernels.push(KernelTime {
            kernel: "gaps, less overlap",
            launches: None,
            us_each: None,
            us_step: rest,
            share: rest / step_us,
        });
        Self { step_us, kernels }
    }
}

impl DecodeShape {
    /// Steps that can be replayed in a row, and tokens in the cache before the first.
    fn steps(&self) -> (usize, usize) {
        let steps = MAX_BURST.min(self.longest - 1);
        (steps, self.context.clamp(1, self.longest - steps))
    }

    /// Blocks of each sequence with room for `tokens` tokens, and how many there are of all: those that the prompt fills
    /// without its last token are the group's, as in the engine.
    fn tables(&self, tokens: usize) -> (Vec<Vec<BlockId>>, usize) {
        let width = tokens.div_ceil(BLOCK_SIZE);
        let shared = (self.prompt_tokens.saturating_sub(1) / BLOCK_SIZE).min(width);
        let mut next = 0..;
        let mut tables = Vec::with_capacity(self.prompts * self.n);
        for _ in 0..self.prompts {
            let prompt: Vec<BlockId> = next.by_ref().take(shared).collect();
            for _ in 0..self.n {
                let own = next.by_ref().take(width - shared);
                tables.push(prompt.iter().copied().chain(own).collect());
            }
        }
        let used = self.prompts * (shared + self.n * (width - shared));
        (tables, used)
    }
}

impl Part {
    /// The part that goes before this one while it is timed. Gates and ups are the most weights of a layer, more than a
    /// cache holds; what is sampled from comes from the head.
    fn before(self) -> Option<Self> {
        match self {
            Self::GateUp => None,
            Self::Sampling => Some(Self::Head),
            _ => Some(Self::GateUp),
        }
    }
}

/// A step's rows and the numbers of its graph.
struct Laid<'a> {
    rows: &'a [StepRow<'a>],
    pad: usize,
    steps: usize,
    siblings: Option<Siblings>,
}

impl CudaBackend {
    /// Times a plain decoding step by kernels. Overwrites keys and values: whatever the pool holds is to be forgotten first.
    ///
    /// # Errors
    /// [`PolicyError::Misuse`] before [`crate::backend::Backend::init_kv`]; [`CudaError::Capacity`] for more sequences or
    /// blocks than there is room for.
    pub fn profile(&mut self, shape: &DecodeShape) -> Result<Profile, PolicyError> {
        if shape.longest < 2 || shape.prompts * shape.n == 0 {
            return Err(PolicyError::Misuse("a profile of no sequence"));
        }
        let (steps, cached) = shape.steps();
        let (tables, asked) = shape.tables(cached + steps);
        let most = self.kv.as_ref().map_or(0, |kv| kv.blocks);
        if asked > most {
            let what = "KV blocks";
            return Err(CudaError::Capacity { what, asked, most }.into());
        }
        let params = SamplingParams::default();
        let ids: Vec<[u32; 1]> = (0..tables.len())
            .map(|row| [(row * 37 % self.spec.vocab_size) as u32])
            .collect();
        let row = |(i, blocks): (usize, &'_ Vec<BlockId>)| StepRow {
            sequence: i as u64,
            tokens: &ids[i],
            position: cached,
            blocks: &tables[i][..blocks.len()],
            sample: Some(SampleArgs {
                params: &params,
                stream: i as u64,
                position: cached as u64 + 1,
                history: &[],
                proposal: None,
                top: 0,
                ahead: steps - 1,
            }),
        };
        let rows: Vec<StepRow<'_>> = tables.iter().enumerate().map(row).collect();
        let pad = bucket(rows.len(), self.decode.rows).saturating_sub(rows.len());
        let laid = Laid {
            rows: &rows,
            pad,
            steps,
            siblings: self.siblings(&rows),
        };
        let profile = self.profile_rows(&laid);
        self.gpu.filter.keep(None);
        profile
    }

    fn profile_rows(&mut self, laid: &Laid<'_>) -> Result<Profile, PolicyError> {
        let args: Vec<_> = laid.rows.iter().filter_map(|r| r.sample.as_ref()).collect();
        let counts = self.lay_out(laid)?;
        self.decode.send_randomness(&self.gpu, &args, laid.steps)?;
        let pass = PassArgs {
            counts,
            splits: self.splits(counts.tiles),
            decode: true,
            siblings: laid.siblings.as_ref().map(|siblings| siblings.grid),
            tune: true,
        };
        self.queue_step(&pass, Sampling::Plain)?;
        self.gpu.filter.take_queued();
        let untuned = PassArgs {
            tune: false,
            ..pass
        };
        self.queue_step(&untuned, Sampling::Plain)?;
        let launches = self.gpu.filter.take_queued();
        self.lay_out(laid)?;
        let whole = self.record_part(&untuned, None)?;
        let step_us = self.replay(laid, &[&whole])?;
        let mut graphs = Vec::new();
        for part in Part::ALL {
            graphs.push(match launches[part as usize] {
                0 => None,
                _ => Some(self.record_part(&untuned, Some(part))?),
            });
        }
        let mut parts = Vec::new();
        for (part, count) in Part::ALL.into_iter().zip(launches) {
            let Some(graph) = &graphs[part as usize] else {
                continue;
            };
            let before = part
                .before()
                .and_then(|part| graphs[part as usize].as_ref());
            let us = match before {
                Some(before) => {
                    self.replay(laid, &[before, graph])? - self.replay(laid, &[before])?
                }
                None => self.replay(laid, &[graph])?,
            };
            parts.push((part.name(), count, us));
        }
        Ok(Profile::of(step_us, &parts))
    }

    /// A step, or one part of it, as a graph.
    fn record_part(
        &mut self,
        pass: &PassArgs,
        part: Option<Part>,
    ) -> Result<CudaGraph, PolicyError> {
        self.gpu.filter.keep(part);
        let graph = self.record(pass, |backend, pass| {
            backend.queue_step(pass, Sampling::Plain)
        });
        self.gpu.filter.keep(None);
        graph
    }

    /// Makes the next step the first again.
    fn lay_out(&mut self, laid: &Laid<'_>) -> Result<Counts, PolicyError> {
        let (group, stream) = (self.group(), &self.gpu.stream);
        let inputs = &mut self.decode.inputs;
        Ok(inputs.fill(stream, laid.rows, laid.pad, group, laid.siblings.as_ref())?)
    }

    /// Microseconds of `graphs` one after the other.
    fn replay(&mut self, laid: &Laid<'_>, graphs: &[&CudaGraph]) -> Result<f64, PolicyError> {
        let mut fastest = f64::INFINITY;
        for _ in 0..ROUNDS {
            self.lay_out(laid)?;
            let stream = &self.gpu.stream;
            stream.synchronize().map_err(CudaError::from)?;
            let start = Instant::now();
            for _ in 0..laid.steps {
                for graph in graphs {
                    graph.launch().map_err(CudaError::from)?;
                }
            }
            stream.synchronize().map_err(CudaError::from)?;
            fastest = fastest.min(start.elapsed().as_secs_f64());
        }
        Ok(fastest * 1e6 / laid.steps as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: DecodeShape = DecodeShape {
        prompts: 2,
        n: 2,
        prompt_tokens: 65,
        context: 100,
        longest: 200,
    };

    #[test]
    fn parts_are_sorted_and_the_rest_comes_last() {
        let profile = Profile::of(200.0, &[("qkv", 10, 50.0), ("head", 1, 120.0)]);
        let row = |kernel, launches, us_each, us_step, share| KernelTime {
            kernel,
            launches,
            us_each,
            us_step,
            share,
        };
        let expected = [
            row("head", Some(1), Some(120.0), 120.0, 0.6),
            row("qkv", Some(10), Some(5.0), 50.0, 0.25),
            row("gaps, less overlap", None, None, 30.0, 0.15),
        ];
        assert_eq!(profile.kernels, expected);
        let overlapping = Profile::of(100.0, &[("head", 1, 120.0)]);
        assert_eq!(overlapping.kernels[1].us_step, -20.0);
    }

    #[test]
    fn a_group_shares_the_blocks_that_its_prompt_fills() {
        let (tables, used) = SHAPE.tables(116);
        let expected = [[0, 1, 2, 3], [0, 1, 4, 5], [6, 7, 8, 9], [6, 7, 10, 11]];
        assert_eq!((tables, used), (expected.map(Vec::from).to_vec(), 12));
        // The last token of a prompt is run by every sequence.
        let even = DecodeShape {
            prompt_tokens: 64,
            ..SHAPE
        };
        assert_eq!(even.tables(116).1, 14);
    }

    #[test]
    fn steps_end_before_the_longest_sequence_does() {
        assert_eq!(SHAPE.steps(), (16, 100));
        let with = |context, longest| DecodeShape {
            context,
            longest,
            ..SHAPE
        };
        assert_eq!(with(199, 200).steps(), (16, 184));
        assert_eq!(with(5, 6).steps(), (5, 1));
        assert_eq!(with(1, 2).steps(), (1, 1));
    }
}
