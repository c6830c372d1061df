//! What the kernel of truncated draws and verification (draw.cu) is told of each row of logits, and what it answers.

use cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, ValidAsZeroBits};

use super::{
    CudaError, MAX_BATCH,
    device::Gpu,
    launch::{CHUNK, CHUNK_WORDS, Draw, NEAR_WORDS},
};
use crate::{
    backend::{SampleArgs, Sampled},
    engine::sampler::{self, Proposal},
    error::PolicyError,
    types::{SamplingParams, TopTokens},
};

/// [`Ask::proposed`] of a row that only draws, and of padding.
const NOTHING: i32 = -1;
const PADDING: i32 = -2;

/// `draw.cu`'s `Ask`, field by field.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Ask {
    q: u64,
    dense: u64,
    accept: f64,
    floor: f32,
    top_p: f32,
    top_k: i32,
    proposed: i32,
}

/// `draw.cu`'s `Verdict`, field by field.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Verdict {
    accepted: i32,
    logprob: f32,
    policy: f32,
}

// SAFETY: numbers without padding between them, laid out as the kernel has them.
unsafe impl DeviceRepr for Ask {}
// SAFETY: as above.
unsafe impl DeviceRepr for Verdict {}
// SAFETY: numbers, all of which may be 0.
unsafe impl ValidAsZeroBits for Ask {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for Verdict {}

/// The greatest f32 distance below the largest logit that min-p leaves, decided as the CPU does (truncate.rs): in f64, by
/// `distance / temperature ≤ -ln(min_p)`. Infinite where min-p is off.
fn farthest(min_p: f32, temperature: f32) -> f32 {
    if min_p <= 0.0 {
        return f32::INFINITY;
    }
    let floor = f64::from(min_p).ln();
    let stays = |distance: f32| f64::from(-distance) / f64::from(temperature) >= floor;
    // Never -0, whose bits the kernel would take for the largest distance.
    let mut distance = (floor * f64::from(temperature)).abs() as f32;
    while distance > 0.0 && !stays(distance) {
        distance = distance.next_down();
    }
    while stays(distance.next_up()) {
        distance = distance.next_up();
    }
    distance
}

impl Ask {
    fn draw(params: &SamplingParams) -> Self {
        Self {
            q: 0,
            dense: 0,
            accept: 0.0,
            floor: farthest(params.min_p, params.temperature),
            top_p: params.top_p,
            top_k: i32::try_from(params.top_k).unwrap_or(i32::MAX),
            proposed: NOTHING,
        }
    }
}

/// What some rows of logits are for, row after row.
#[derive(Default)]
pub(super) struct Asks {
    asks: Vec<Ask>,
    temperature: Vec<f32>,
    uniform: Vec<f64>,
}

impl Asks {
    pub(super) fn len(&self) -> usize {
        self.asks.len()
    }

    fn push(&mut self, ask: Ask, params: &SamplingParams, uniform: f64) {
        // What the kernels take for greedy.
        let greedy = params.temperature < sampler::GREEDY_BELOW;
        self.temperature
            .push(if greedy { 0.0 } else { params.temperature });
        self.asks.push(ask);
        self.uniform.push(uniform);
    }

    /// One row per proposed token and one more; `q` has the addresses of the draft's probabilities `[V]`, or nothing for
    /// a draft that is certain.
    pub(super) fn verify(&mut self, args: &SampleArgs<'_>, q: &[u64]) {
        let proposed = args.proposal.map_or(&[][..], |p| &p.tokens);
        for i in 0..=proposed.len() {
            let position = args.position + i as u64;
            let mut ask = Ask::draw(args.params);
            if let Some(token) = proposed.get(i) {
                ask.q = q.get(i).copied().unwrap_or(0);
                ask.accept = sampler::accept_uniform(args.stream, position);
                ask.proposed = i32::try_from(*token).unwrap_or(i32::MAX);
            }
            let uniform = sampler::uniform(args.stream, position);
            self.push(ask, args.params, uniform);
        }
    }

    /// A draft's draw, which leaves its probabilities `[V]` at the address `dense`.
    pub(super) fn draft(&mut self, args: &SampleArgs<'_>, dense: u64) {
        let ask = Ask {
            dense,
            ..Ask::draw(args.params)
        };
        let uniform = sampler::draft_uniform(args.stream, args.position);
        self.push(ask, args.params, uniform);
    }

    /// Padding up to `rows` rows.
    pub(super) fn pad(&mut self, rows: usize) {
        let params = SamplingParams::default();
        let ask = Ask {
            proposed: PADDING,
            ..Ask::draw(&params)
        };
        while self.len() < rows {
            self.push(ask, &params, 0.0);
        }
    }

    /// Draws of up to `steps` steps in a row; `stride` numbers lie between those of two steps.
    pub(super) fn burst(rows: &[&SampleArgs<'_>], steps: usize, stride: usize) -> Self {
        let mut all = Self::default();
        for args in rows {
            all.push(Ask::draw(args.params), args.params, 0.0);
        }
        all.pad(stride);
        all.uniform = vec![0.0; steps * stride];
        for (i, args) in rows.iter().enumerate() {
            for step in 0..steps.min(args.ahead + 1) {
                let position = args.position + step as u64;
                all.uniform[step * stride + i] = sampler::uniform(args.stream, position);
            }
        }
        all
    }
}

/// Bytes of [`Draws`] for each token of a pass, each draw of a burst, and each chunk of a row of logits.
pub(super) const BYTES_A_TOKEN: usize = size_of::<f32>() + size_of::<Ask>() + size_of::<Verdict>();
pub(super) const BYTES_A_CELL: usize = size_of::<f64>() + 3 * size_of::<f32>();
pub(super) const BYTES_A_CHUNK: usize = 4 * CHUNK_WORDS + 8 * NEAR_WORDS;

/// Buffers of the kernel.
pub(super) struct Draws {
    temperature: CudaSlice<f32>,
    asks: CudaSlice<Ask>,
    /// `[steps, rows]` in bursts, as `token`, `logprob` and `policy`.
    uniform: CudaSlice<f64>,
    token: CudaSlice<i32>,
    logprob: CudaSlice<f32>,
    policy: CudaSlice<f32>,
    verdicts: CudaSlice<Verdict>,
    /// Of one row of logits each.
    chunks: CudaSlice<u32>,
    near: CudaSlice<u64>,
    /// For what is not a burst.
    first_step: CudaSlice<i32>,
}

/// Which steps of a burst a kernel is to read and write: the address of their counter, and what lies between two.
#[derive(Clone, Copy, Debug)]
pub(super) struct Steps {
    pub(super) counter: u64,
    pub(super) stride: usize,
}

impl Draws {
    /// For so many `rows` of logits at a time, `sampled` of them in a pass and `cells` draws in a burst.
    pub(super) fn new(
        gpu: &Gpu,
        vocab: usize,
        rows: usize,
        sampled: usize,
        cells: usize,
    ) -> Result<Self, CudaError> {
        let stream = &gpu.stream;
        let (sampled, cells) = (sampled.max(MAX_BATCH), cells.max(sampled).max(MAX_BATCH));
        Ok(Self {
            temperature: stream.alloc_zeros(sampled)?,
            asks: stream.alloc_zeros(sampled)?,
            uniform: stream.alloc_zeros(cells)?,
            token: stream.alloc_zeros(cells)?,
            logprob: stream.alloc_zeros(cells)?,
            policy: stream.alloc_zeros(cells)?,
            verdicts: stream.alloc_zeros(sampled)?,
            chunks: stream.alloc_zeros(rows * vocab.div_ceil(CHUNK) * CHUNK_WORDS)?,
            near: stream.alloc_zeros(rows * vocab.div_ceil(CHUNK) * NEAR_WORDS)?,
            first_step: stream.alloc_zeros(1)?,
        })
    }

    pub(super) fn send(&mut self, gpu: &Gpu, asks: &Asks) -> Result<(), CudaError> {
        let stream = &gpu.stream;
        stream.memcpy_htod(&asks.asks, &mut self.asks.slice_mut(..asks.len()))?;
        let temperature = &mut self.temperature.slice_mut(..asks.len());
        stream.memcpy_htod(&asks.temperature, temperature)?;
        let uniform = &mut self.uniform.slice_mut(..asks.uniform.len());
        stream.memcpy_htod(&asks.uniform, uniform)?;
        Ok(())
    }

    /// Queues what was asked of rows `first` to `first + rows`, whose logits lie at an address.
    pub(super) fn queue(
        &self,
        gpu: &Gpu,
        (logits, vocab): (u64, usize),
        (first, rows): (usize, usize),
        steps: Option<Steps>,
    ) -> Result<(), CudaError> {
        let stream = &gpu.stream;
        let numbers = |s: &CudaSlice<f32>| s.device_ptr(stream).0 + (first * 4) as u64;
        let asks = self.asks.device_ptr(stream).0;
        let verdicts = self.verdicts.device_ptr(stream).0;
        let draw = Draw {
            logits,
            chunks: self.chunks.device_ptr(stream).0,
            near: self.near.device_ptr(stream).0,
            temperature: numbers(&self.temperature),
            asks: asks + (first * size_of::<Ask>()) as u64,
            uniform: self.uniform.device_ptr(stream).0 + (first * size_of::<f64>()) as u64,
            token: self.token.device_ptr(stream).0 + (first * size_of::<i32>()) as u64,
            logprob: numbers(&self.logprob),
            policy: numbers(&self.policy),
            verdicts: verdicts + (first * size_of::<Verdict>()) as u64,
            step: steps.map_or(self.first_step.device_ptr(stream).0, |s| s.counter),
            stride: steps.map_or(0, |s| s.stride as i32),
            vocab: vocab as i32,
        };
        gpu.draw(&draw, rows)
    }

    /// Address of what was drawn, `[steps, stride]`.
    pub(super) fn tokens(&self, gpu: &Gpu) -> u64 {
        self.token.device_ptr(&gpu.stream).0
    }

    /// What `cells` draws came to, and the verdicts about the first `verified` rows.
    pub(super) fn read(
        &self,
        gpu: &Gpu,
        cells: usize,
        verified: usize,
    ) -> Result<Answers, CudaError> {
        let stream = &gpu.stream;
        let answers = Answers {
            token: stream.clone_dtoh(&self.token.slice(..cells))?,
            logprob: stream.clone_dtoh(&self.logprob.slice(..cells))?,
            policy: stream.clone_dtoh(&self.policy.slice(..cells))?,
            verdicts: stream.clone_dtoh(&self.verdicts.slice(..verified))?,
        };
        stream.synchronize()?;
        Ok(answers)
    }
}

/// See [`Draws::read`].
pub(super) struct Answers {
    token: Vec<i32>,
    logprob: Vec<f32>,
    policy: Vec<f32>,
    verdicts: Vec<Verdict>,
}

fn sampled(
    token: u32,
    logprob: f32,
    policy_logprob: f32,
    position: u64,
) -> Result<Sampled, PolicyError> {
    if !logprob.is_finite() || !policy_logprob.is_finite() {
        let position = position as usize;
        return Err(PolicyError::NonFiniteLogits { position });
    }
    Ok(Sampled {
        token,
        logprob,
        policy_logprob,
        top: TopTokens::default(),
    })
}

impl Answers {
    /// What was drawn in a cell, for `position`.
    ///
    /// # Errors
    /// [`PolicyError::NonFiniteLogits`] there.
    pub(super) fn drawn(&self, cell: usize, position: u64) -> Result<Sampled, PolicyError> {
        let token = self.token[cell] as u32;
        sampled(token, self.logprob[cell], self.policy[cell], position)
    }

    /// The accepted tokens of a proposal whose rows begin at `first`, and one more ([`sampler::verify`]).
    ///
    /// # Errors
    /// [`PolicyError::NonFiniteLogits`].
    pub(super) fn verified(
        &self,
        first: usize,
        proposal: Option<&Proposal>,
        position: u64,
    ) -> Result<Vec<Sampled>, PolicyError> {
        let proposed = proposal.map_or(&[][..], |p| &p.tokens);
        let mut out = Vec::with_capacity(proposed.len() + 1);
        for (i, token) in proposed.iter().enumerate() {
            let (verdict, position) = (self.verdicts[first + i], position + i as u64);
            if verdict.accepted == 0 {
                break;
            }
            let accepted = sampled(*token, verdict.logprob, verdict.policy, position)?;
            out.push(accepted);
        }
        let i = out.len();
        out.push(self.drawn(first + i, position + i as u64)?);
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::farthest;

    #[test]
    fn the_farthest_distance_is_the_last_that_stays() {
        for (min_p, temperature) in [(0.05f32, 1.0f32), (0.5, 0.7), (1e-6, 1.7), (1.0, 0.3)] {
            let floor = f64::from(min_p).ln();
            let scaled = |d: f32| f64::from(-d) / f64::from(temperature);
            let last = farthest(min_p, temperature);
            assert!(scaled(last) >= floor, "{min_p} {temperature}: {last}");
            assert!(
                scaled(last.next_up()) < floor,
                "{min_p} {temperature}: {last}"
            );
        }
        assert_eq!(farthest(0.0, 1.0), f32::INFINITY);
        assert_eq!(farthest(1.0, 1.0).to_bits(), 0);
        assert_eq!(farthest(0.1, 0.0).to_bits(), 0);
    }
}
