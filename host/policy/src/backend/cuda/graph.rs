//! Decoding as a captured graph: one for each size of batch, replayed several times without the host in between. Tokens,
//! positions and lengths advance on the device; what was drawn is read once at the end.

mod profile;

use cudarc::driver::{
    CudaGraph, CudaSlice, DevicePtr, PinnedHostSlice,
    sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
};

use super::{
    CudaBackend, CudaError,
    device::Gpu,
    draws::{Asks, Steps},
    forward::{Addresses, PassArgs},
    inputs::{Counts, Field, Inputs, Layout, Onward},
    launch::{CHUNK, CHUNK_WORDS, SampleArgs},
    parts::Part,
    siblings::{Grid, Siblings},
    step::Sampling,
};
use crate::{
    backend::{Exit, Sampled, StepRow},
    engine::sampler,
    error::PolicyError,
    types::TopTokens,
};

pub use profile::{DecodeShape, KernelTime, Profile};

/// Steps replayed between two looks of the host. Long enough that its part is small, short enough that what a
/// finished sequence draws in vain is too.
pub(super) const MAX_BURST: usize = 16;

/// What a graph was captured for. `rows`: sequences; `width`: tokens of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Captured {
    Decode {
        rows: usize,
        sampling: Sampling,
        siblings: Option<Grid>,
    },
    Verify {
        rows: usize,
        width: usize,
    },
    Propose {
        rows: usize,
        width: usize,
        exit: Exit,
    },
}

/// The random numbers of a row.
pub(super) struct Chances<'a> {
    /// Where the row is in the burst.
    pub(super) slot: usize,
    pub(super) args: &'a crate::backend::SampleArgs<'a>,
    /// Tokens that come before those of the burst.
    pub(super) skipped: usize,
}

/// Inputs and results of bursts.
pub(super) struct Decode {
    inputs: Inputs,
    temperature: CudaSlice<f32>,
    /// `[MAX_BURST, rows]`.
    uniform: CudaSlice<f64>,
    token: CudaSlice<i32>,
    logprob: CudaSlice<f32>,
    chunks: CudaSlice<u32>,
    rows: usize,
}

impl Decode {
    pub(super) fn new(gpu: &Gpu, layout: Layout, vocab: usize) -> Result<Self, CudaError> {
        let rows = layout.sequences;
        let layout = Layout {
            tokens: rows,
            ..layout
        };
        Ok(Self {
            inputs: Inputs::new(&gpu.stream, layout)?,
            temperature: gpu.stream.alloc_zeros(rows)?,
            uniform: gpu.stream.alloc_zeros(MAX_BURST * rows)?,
            token: gpu.stream.alloc_zeros(MAX_BURST * rows)?,
            logprob: gpu.stream.alloc_zeros(MAX_BURST * rows)?,
            chunks: gpu
                .stream
                .alloc_zeros(rows * vocab.div_ceil(CHUNK) * CHUNK_WORDS)?,
            rows,
        })
    }

    /// Sends temperatures and random numbers of `steps` steps.
    pub(super) fn send_randomness(
        &mut self,
        gpu: &Gpu,
        rows: &[&crate::backend::SampleArgs<'_>],
        steps: usize,
    ) -> Result<(), CudaError> {
        let rows: Vec<Chances<'_>> = rows
            .iter()
            .enumerate()
            .map(|(slot, args)| Chances {
                slot,
                args,
                skipped: 0,
            })
            .collect();
        let mut randomness = (vec![1f32; self.rows], vec![0f64; steps * self.rows]);
        let by = (&mut randomness.0[..], &mut randomness.1[..]);
        self.send_randomness_by(gpu, &rows, steps, by)
    }

    /// The same by way of host memory for `[rows]` temperatures and `[steps, rows]` numbers.
    pub(super) fn send_randomness_by(
        &mut self,
        gpu: &Gpu,
        rows: &[Chances<'_>],
        steps: usize,
        (temperature, uniform): (&mut [f32], &mut [f64]),
    ) -> Result<(), CudaError> {
        let uniform = &mut uniform[..steps * self.rows];
        for row in rows {
            let (args, degree) = (row.args, row.args.params.temperature);
            temperature[row.slot] = if degree < sampler::GREEDY_BELOW {
                0.0
            } else {
                degree
            };
            for step in 0..steps.min((args.ahead + 1).saturating_sub(row.skipped)) {
                let position = args.position + (row.skipped + step) as u64;
                uniform[step * self.rows + row.slot] = sampler::uniform(args.stream, position);
            }
        }
        let stream = &gpu.stream;
        stream.memcpy_htod(&*temperature, &mut self.temperature)?;
        stream.memcpy_htod(&*uniform, &mut self.uniform.slice_mut(..steps * self.rows))?;
        Ok(())
    }

    /// Queues the sampling of `rows` rows of logits at an address.
    pub(super) fn sample(
        &self,
        gpu: &Gpu,
        logits: u64,
        vocab: usize,
        rows: usize,
    ) -> Result<(), CudaError> {
        let stream = &gpu.stream;
        let args = SampleArgs {
            logits,
            chunks: self.chunks.device_ptr(stream).0,
            temperature: self.temperature.device_ptr(stream).0,
            uniform: self.uniform.device_ptr(stream).0,
            token: self.token.device_ptr(stream).0,
            logprob: self.logprob.device_ptr(stream).0,
            step: self.inputs.at(Field::Step),
            stride: self.rows as i32,
            vocab: vocab as i32,
        };
        gpu.sample(&args, rows)
    }

    /// Makes the next sampling the first of a burst again.
    pub(super) fn rewind(&mut self, gpu: &Gpu) -> Result<(), CudaError> {
        self.inputs.fill(&gpu.stream, &[], 0, 1, None)?;
        Ok(())
    }

    /// What was drawn in one step.
    pub(super) fn drawn_once(&self, gpu: &Gpu) -> Result<(Vec<i32>, Vec<f32>), CudaError> {
        let stream = &gpu.stream;
        let token = stream.clone_dtoh(&self.token.slice(..self.rows))?;
        let logprob = stream.clone_dtoh(&self.logprob.slice(..self.rows))?;
        stream.synchronize()?;
        Ok((token, logprob))
    }

    /// Sends the inputs of decoding: `rows`, and `pad` rows of padding.
    pub(super) fn send_rows(
        &mut self,
        gpu: &Gpu,
        rows: &[StepRow<'_>],
        pad: usize,
        group: usize,
        siblings: Option<&Siblings>,
    ) -> Result<Counts, CudaError> {
        self.inputs.fill(&gpu.stream, rows, pad, group, siblings)
    }

    /// Sends what rows of a burst of `slots` need to go on from where the device has come to ([`Inputs::refill`]).
    pub(super) fn send_more(
        &mut self,
        gpu: &Gpu,
        rows: &[Onward<'_>],
        slots: usize,
        by: &mut [i32],
    ) -> Result<(), CudaError> {
        self.inputs.refill(&gpu.stream, rows, slots, by)
    }

    /// Integers that [`Decode::send_more`] sends, at most.
    pub(super) fn more(&self) -> usize {
        self.inputs.more()
    }

    /// Queues the copy of what `steps` steps have drawn, `[steps, rows]`.
    pub(super) fn send_home(
        &self,
        gpu: &Gpu,
        steps: usize,
        token: &mut PinnedHostSlice<i32>,
        logprob: &mut PinnedHostSlice<f32>,
    ) -> Result<(), CudaError> {
        let n = steps * self.rows;
        gpu.stream.memcpy_dtoh(&self.token.slice(..n), token)?;
        Ok(gpu.stream.memcpy_dtoh(&self.logprob.slice(..n), logprob)?)
    }

    /// Sequences of a burst, at most.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// `token`: address of what was drawn, `[steps, rows]`.
    fn advance(&self, gpu: &Gpu, token: u64, rows: usize) -> Result<(), CudaError> {
        let at = |field| self.inputs.at(field);
        let fields = [
            at(Field::Ids),
            at(Field::Positions),
            at(Field::KvLen),
            at(Field::Left),
            token,
            at(Field::Step),
        ];
        gpu.advance(&fields, self.rows as i32, rows)
    }
}

/// Tokens and log-probs of some steps, `stride` apart.
pub(super) struct Drawn<'a> {
    pub(super) token: &'a [i32],
    pub(super) logprob: &'a [f32],
    pub(super) stride: usize,
}

impl Drawn<'_> {
    /// # Errors
    /// [`PolicyError::NonFiniteLogits`] at `position`.
    pub(super) fn get(
        &self,
        step: usize,
        row: usize,
        position: usize,
    ) -> Result<Sampled, PolicyError> {
        let at = step * self.stride + row;
        let logprob = self.logprob[at];
        if !logprob.is_finite() {
            return Err(PolicyError::NonFiniteLogits { position });
        }
        Ok(Sampled {
            token: self.token[at] as u32,
            logprob,
            policy_logprob: logprob,
            top: TopTokens::default(),
        })
    }
}

/// Rows of the graph that serves `rows`: every number up to 8, then steps that waste at most an eighth.
pub(super) fn bucket(rows: usize, most: usize) -> usize {
    let size = match rows {
        0..=8 => rows,
        9..=256 => rows.next_multiple_of(8),
        _ => rows.next_multiple_of(16),
    };
    size.min(most)
}

impl CudaBackend {
    /// Draws up to `ahead + 1` tokens for every row, some from truncated distributions.
    pub(super) fn truncated_burst(
        &mut self,
        rows: &[StepRow<'_>],
    ) -> Result<Vec<Vec<Sampled>>, PolicyError> {
        let size = bucket(rows.len(), self.decode.rows);
        let args: Vec<_> = rows.iter().filter_map(|row| row.sample.as_ref()).collect();
        let most = args.iter().map(|a| a.ahead + 1).max().unwrap_or(1);
        let (steps, stride) = (most.min(MAX_BURST), self.decode.rows);
        let asks = Asks::burst(&args, steps, stride);
        self.draws.send(&self.gpu, &asks)?;
        let siblings = self.siblings(rows);
        let key = self.captured(size, rows, Sampling::Truncated, siblings.as_ref())?;
        let (group, pad) = (self.group(), size - rows.len());
        self.decode
            .send_rows(&self.gpu, rows, pad, group, siblings.as_ref())?;
        for _ in 0..steps {
            self.graphs[&key].launch().map_err(CudaError::from)?;
        }
        let answers = self.draws.read(&self.gpu, steps * stride, 0)?;
        each_step(&args, steps, |step, i, position| {
            answers.drawn(step * stride + i, position)
        })
    }

    /// Those of the rows that read together what they share. In the deterministic mode nothing depends on neighbours.
    pub(super) fn siblings(&self, rows: &[StepRow<'_>]) -> Option<Siblings> {
        if self.deterministic {
            return None;
        }
        let kernels = &self.gpu.kernels.decode_group;
        Siblings::of(rows, &self.spec, self.gpu.multiprocessors)
            .filter(|siblings| kernels.serves(siblings.grid, self.group()))
    }

    /// Makes the graph of a decoding step of `size` rows, if it is not there.
    pub(super) fn captured(
        &mut self,
        size: usize,
        rows: &[StepRow<'_>],
        sampling: Sampling,
        siblings: Option<&Siblings>,
    ) -> Result<Captured, PolicyError> {
        let key = Captured::Decode {
            rows: size,
            sampling,
            siblings: siblings.map(|siblings| siblings.grid),
        };
        if !self.graphs.contains_key(&key) {
            let graph = self.capture(size, rows, sampling, siblings)?;
            self.graphs.insert(key, graph);
        }
        Ok(key)
    }

    /// Records a step of `size` rows, after running it once to load, tune and allocate what capturing must not. `rows`
    /// are real ones; the step they are run for here is run again.
    fn capture(
        &mut self,
        size: usize,
        rows: &[StepRow<'_>],
        sampling: Sampling,
        siblings: Option<&Siblings>,
    ) -> Result<CudaGraph, PolicyError> {
        let (group, pad) = (self.group(), size - rows.len());
        let counts = self
            .decode
            .inputs
            .fill(&self.gpu.stream, rows, pad, group, siblings)?;
        let pass = PassArgs {
            counts,
            splits: self.splits(counts.tiles),
            decode: true,
            siblings: siblings.map(|siblings| siblings.grid),
            tune: true,
        };
        self.record(&pass, |backend, pass| backend.queue_step(pass, sampling))
    }

    /// Records what `queue` queues for `pass`, after running it once; the inputs are there already.
    pub(super) fn record(
        &mut self,
        pass: &PassArgs,
        queue: impl Fn(&mut Self, &PassArgs) -> Result<(), PolicyError>,
    ) -> Result<CudaGraph, PolicyError> {
        queue(self, pass)?;
        self.gpu.stream.synchronize().map_err(CudaError::from)?;
        let stream = self.gpu.stream.clone();
        stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)
            .map_err(CudaError::from)?;
        let untuned = PassArgs {
            tune: false,
            ..*pass
        };
        let queued = queue(self, &untuned);
        let graph = stream
            .end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
            .map_err(CudaError::from)?;
        queued?;
        graph.ok_or(PolicyError::Misuse("nothing was captured"))
    }

    fn queue_step(&mut self, pass: &PassArgs, sampling: Sampling) -> Result<(), PolicyError> {
        let at = Addresses::of(&self.decode.inputs);
        let n = pass.counts.tokens;
        self.run_layers(&at, pass)?;
        self.head(&at, pass, 0, n)?;
        self.gpu.filter.enter(Part::Sampling);
        let logits = self.work.logits.device_ptr(&self.gpu.stream).0;
        let token = match sampling {
            Sampling::Plain => {
                self.decode
                    .sample(&self.gpu, logits, self.spec.vocab_size, n)?;
                self.decode.token.device_ptr(&self.gpu.stream).0
            }
            Sampling::Truncated => {
                let steps = Steps {
                    counter: self.decode.inputs.at(Field::Step),
                    stride: self.decode.rows,
                };
                let of = (logits, self.spec.vocab_size);
                self.draws.queue(&self.gpu, of, (0, n), Some(steps))?;
                self.draws.tokens(&self.gpu)
            }
        };
        self.gpu.filter.enter(Part::Advance);
        Ok(self.decode.advance(&self.gpu, token, n)?)
    }
}

/// What `get(step, row, position)` gives for every step that each row asked for.
fn each_step(
    rows: &[&crate::backend::SampleArgs<'_>],
    steps: usize,
    get: impl Fn(usize, usize, u64) -> Result<Sampled, PolicyError>,
) -> Result<Vec<Vec<Sampled>>, PolicyError> {
    let of_row = |(i, args): (usize, &&crate::backend::SampleArgs<'_>)| {
        (0..=args.ahead.min(steps - 1))
            .map(|step| get(step, i, args.position + step as u64))
            .collect()
    };
    rows.iter().enumerate().map(of_row).collect()
}

#[cfg(test)]
mod tests {
    use super::bucket;

    #[test]
    fn buckets_waste_little() {
        for rows in 1..=512 {
            let size = bucket(rows, 512);
            assert!(
                size >= rows && size - rows <= 16.min(rows),
                "{rows} in {size}"
            );
        }
        assert_eq!(
            (bucket(9, 512), bucket(300, 512), bucket(300, 300)),
            (16, 304, 300)
        );
    }
}
