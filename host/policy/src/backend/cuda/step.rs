//! Passes of any shape, run kernel by kernel: prompts, mixed steps, and whatever sampling the kernels do not do.

use cudarc::driver::DevicePtr;

use super::{
    BLOCK_SIZE, CudaBackend, CudaError,
    forward::{Addresses, PassArgs},
    graph::Drawn,
};
use crate::{
    backend::{BlockId, SampleArgs, Sampled, StepRow},
    engine::sampler,
    error::PolicyError,
};

/// How the next tokens of a step are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Sampling {
    /// From the whole distribution, by the fastest kernel (sample.cu).
    Plain,
    /// Some rows have top-k, top-p or min-p (draw.cu).
    Truncated,
}

/// Whether kernels draw and verify; the rest is left to the host, on a copy of the logits: a penalty needs the text, and
/// likely tokens are only reported while a draft learns.
fn is_for_device(args: &SampleArgs<'_>) -> bool {
    args.params.repetition_penalty == 1.0 && args.top == 0
}

fn is_plain(args: &SampleArgs<'_>) -> bool {
    let p = args.params;
    let whole = p.top_k == 0 && p.top_p >= 1.0 && p.min_p <= 0.0;
    // Greedy draws are not truncated.
    let whole = whole || p.temperature < sampler::GREEDY_BELOW;
    whole && is_for_device(args) && args.proposal.is_none()
}

/// Whether kernels draw for every row that samples.
pub(super) fn decided_on_device(rows: &[StepRow<'_>]) -> bool {
    rows.iter()
        .filter_map(|row| row.sample.as_ref())
        .all(is_for_device)
}

/// How to draw where every row runs one token and draws its successor on the device; `None` for all other steps.
pub(super) fn decoding(rows: &[StepRow<'_>]) -> Option<Sampling> {
    let mut sampling = Sampling::Plain;
    for row in rows {
        let args = row.sample.as_ref()?;
        if row.tokens.len() != 1 || !is_for_device(args) || args.proposal.is_some() {
            return None;
        }
        if !is_plain(args) {
            sampling = Sampling::Truncated;
        }
    }
    Some(sampling)
}

/// Logits of some sampled tokens on the host.
pub(super) struct HostLogits {
    values: Vec<f32>,
    vocab: usize,
}

impl HostLogits {
    pub(super) fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.vocab..][..self.vocab]
    }
}

impl CudaBackend {
    /// A step that nothing has been prepared for.
    pub(super) fn step_anew(
        &mut self,
        rows: &[StepRow<'_>],
    ) -> Result<Vec<Vec<Sampled>>, PolicyError> {
        match decoding(rows) {
            Some(Sampling::Plain) => return self.burst(rows),
            Some(Sampling::Truncated) => return self.truncated_burst(rows),
            None => {}
        }
        if decided_on_device(rows)
            && let Some(verified) = self.verify_rows(rows)?
        {
            return Ok(verified);
        }
        self.mixed_step(rows)
    }

    /// Prompts, and whatever else no graph is for.
    fn mixed_step(&mut self, rows: &[StepRow<'_>]) -> Result<Vec<Vec<Sampled>>, PolicyError> {
        let (at, pass) = self.run_rows(rows)?;
        let args: Vec<&SampleArgs<'_>> = rows.iter().filter_map(|r| r.sample.as_ref()).collect();
        let drawn = if args.iter().all(|args| is_plain(args)) {
            self.draw_on_device(&at, &pass, &args)?
        } else if decided_on_device(rows) {
            self.decide_on_device(&at, &pass, &args)?
        } else {
            self.draw_on_host(&at, &pass, &args)?
        };
        let mut drawn = drawn.into_iter();
        let mut next = |row: &StepRow<'_>| match &row.sample {
            Some(_) => drawn.next().unwrap_or_default(),
            None => Vec::new(),
        };
        Ok(rows.iter().map(&mut next).collect())
    }

    fn run_rows(&mut self, rows: &[StepRow<'_>]) -> Result<(Addresses, PassArgs), PolicyError> {
        let group = self.group();
        let counts = self.inputs.fill(&self.gpu.stream, rows, 0, group, None)?;
        let pass = PassArgs {
            counts,
            splits: self.splits(counts.tiles),
            decode: false,
            siblings: None,
            tune: false,
        };
        let at = Addresses::of(&self.inputs);
        self.run_layers(&at, &pass)?;
        Ok((at, pass))
    }

    fn draw_on_device(
        &mut self,
        at: &Addresses,
        pass: &PassArgs,
        args: &[&SampleArgs<'_>],
    ) -> Result<Vec<Vec<Sampled>>, PolicyError> {
        let mut out = Vec::with_capacity(args.len());
        for first in (0..args.len()).step_by(self.work.max_rows) {
            let n = self.work.max_rows.min(args.len() - first);
            let part = &args[first..first + n];
            self.head(at, pass, first, n)?;
            self.decode.rewind(&self.gpu)?;
            self.decode.send_randomness(&self.gpu, part, 1)?;
            let logits = self.work.logits.device_ptr(&self.gpu.stream).0;
            self.decode
                .sample(&self.gpu, logits, self.spec.vocab_size, n)?;
            let (token, logprob) = self.decode.drawn_once(&self.gpu)?;
            let drawn = Drawn {
                token: &token,
                logprob: &logprob,
                stride: 0,
            };
            for (i, args) in part.iter().enumerate() {
                out.push(vec![drawn.get(0, i, args.position as usize)?]);
            }
        }
        Ok(out)
    }

    /// The CPU's own sampler and verifier on copied logits: what it does is right by construction, and slow.
    fn draw_on_host(
        &mut self,
        at: &Addresses,
        pass: &PassArgs,
        args: &[&SampleArgs<'_>],
    ) -> Result<Vec<Vec<Sampled>>, PolicyError> {
        let mut out = Vec::with_capacity(args.len());
        let (mut first, mut rest) = (0, args);
        while !rest.is_empty() {
            let rows_of = |a: &SampleArgs<'_>| 1 + a.proposal.map_or(0, |p| p.tokens.len());
            let mut n = 0;
            let fits = |a: &&&SampleArgs<'_>| {
                n += rows_of(a);
                n <= self.work.max_rows
            };
            let taken = rest.iter().take_while(fits).count().max(1);
            let (part, later) = rest.split_at(taken);
            let n = part.iter().map(|a| rows_of(a)).sum();
            let logits = self.host_logits(at, pass, first, n)?;
            let mut row = 0;
            for args in part {
                let from = row;
                out.push(sampler::verify(
                    |i| logits.row(from + i),
                    args,
                    &mut self.scratch,
                )?);
                row += rows_of(args);
            }
            first += n;
            rest = later;
        }
        Ok(out)
    }

    fn host_logits(
        &mut self,
        at: &Addresses,
        pass: &PassArgs,
        first: usize,
        n: usize,
    ) -> Result<HostLogits, PolicyError> {
        self.head(at, pass, first, n)?;
        self.fetch_logits(n)
    }

    /// The first `n` rows of logits.
    pub(super) fn fetch_logits(&self, n: usize) -> Result<HostLogits, PolicyError> {
        let (stream, vocab) = (&self.gpu.stream, self.spec.vocab_size);
        let values = stream.clone_dtoh(&self.work.logits.slice(..n * vocab));
        let values = values.map_err(CudaError::from)?;
        stream.synchronize().map_err(CudaError::from)?;
        Ok(HostLogits { values, vocab })
    }

    /// See [`crate::backend::Backend::copy_kv`]. A kernel's blocks run in any order, so a copy of a copy waits for it.
    pub(super) fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), PolicyError> {
        let kv = self
            .kv
            .as_ref()
            .ok_or(PolicyError::Misuse("copy_kv before init_kv"))?;
        let block_bytes = BLOCK_SIZE * self.spec.kv_dim() * size_of::<half::bf16>();
        let sizes = (
            self.spec.num_hidden_layers,
            kv.blocks * block_bytes,
            block_bytes,
        );
        let mut rest = copies;
        while !rest.is_empty() {
            let clash = (1..rest.len()).find(|&i| {
                let touched = |(from, to): &(BlockId, BlockId)| {
                    [*from, *to].contains(&rest[i].1) || *to == rest[i].0
                };
                rest[..i].iter().any(touched)
            });
            let (now, later) = rest.split_at(clash.unwrap_or(rest.len()));
            let pairs: Vec<i32> = now
                .iter()
                .flat_map(|(a, b)| [*a as i32, *b as i32])
                .collect();
            let stream = &self.gpu.stream;
            let pairs = stream.clone_htod(&pairs).map_err(CudaError::from)?;
            let address = pairs.device_ptr(stream).0;
            self.gpu.copy_blocks(kv.base, address, now.len(), sizes)?;
            rest = later;
        }
        Ok(())
    }
}
