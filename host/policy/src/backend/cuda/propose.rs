//! Drafting: passes of the whole model or of its first layers, the draw of the drafted token, and its probabilities, which
//! stay on the device for the policy to verify with.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::{
    CudaBackend, CudaError,
    draws::Asks,
    forward::{Addresses, PassArgs},
    graph::{Captured, bucket},
    inputs::Uniform,
};
use crate::{
    backend::{Drafted, Exit, SampleArgs, StepRow},
    engine::sampler::{self, Distribution},
    error::PolicyError,
};

/// Tokens of a row in a graph, at most: the last one drawn, and the one that a proposal accepted to its end leaves behind.
const MAX_WIDTH: usize = 2;

/// Probabilities `[V]` on the GPU that drafted. The buffer is used again when nobody has a row of it any more.
#[derive(Clone)]
pub struct DeviceRow {
    buffer: Arc<CudaSlice<f32>>,
    row: usize,
    vocab: usize,
}

impl std::fmt::Debug for DeviceRow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceRow([{}])", self.vocab)
    }
}

/// The same row of the same buffer.
impl PartialEq for DeviceRow {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.buffer, &other.buffer) && self.row == other.row
    }
}

impl DeviceRow {
    /// A copy on the host.
    pub(crate) fn fetch(&self) -> Result<Vec<f32>, PolicyError> {
        let stream = self.buffer.stream();
        let from = self.row * self.vocab;
        let row = self.buffer.slice(from..from + self.vocab);
        let values = stream.clone_dtoh(&row).map_err(CudaError::from)?;
        stream.synchronize().map_err(CudaError::from)?;
        Ok(values)
    }

    /// Its address, if it is on the GPU of `stream` and of `vocab` numbers.
    pub(super) fn address_on(&self, stream: &Arc<CudaStream>, vocab: usize) -> Option<u64> {
        let own = self.buffer.stream();
        let here = own.context().ordinal() == stream.context().ordinal() && vocab == self.vocab;
        let offset = (self.row * self.vocab * size_of::<f32>()) as u64;
        here.then(|| self.buffer.device_ptr(own).0 + offset)
    }
}

/// Buffers of probabilities, handed out again when their rows are gone: the driver gives memory back at every wait for it,
/// and taking it anew would cost more than the draft.
#[derive(Default)]
pub(super) struct Shelf {
    buffers: Vec<Arc<CudaSlice<f32>>>,
}

impl Shelf {
    fn take(
        &mut self,
        stream: &Arc<CudaStream>,
        len: usize,
    ) -> Result<Arc<CudaSlice<f32>>, CudaError> {
        let free = |b: &&Arc<CudaSlice<f32>>| Arc::strong_count(b) == 1 && b.len() >= len;
        if let Some(buffer) = self.buffers.iter().find(free) {
            return Ok(buffer.clone());
        }
        // All that are free are too small for what the batch has grown to.
        self.buffers.retain(|b| Arc::strong_count(b) > 1);
        let buffer = Arc::new(stream.alloc_zeros(len)?);
        self.buffers.push(Arc::clone(&buffer));
        Ok(buffer)
    }
}

impl CudaBackend {
    /// See [`crate::backend::Backend::propose`].
    pub(super) fn propose_rows(
        &mut self,
        rows: &[StepRow<'_>],
        exit: Exit,
    ) -> Result<Vec<Drafted>, PolicyError> {
        let missing = PolicyError::Misuse("every row of a draft samples");
        let args: Option<Vec<&SampleArgs<'_>>> = rows.iter().map(|r| r.sample.as_ref()).collect();
        let args = args.ok_or(missing)?;
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        self.run_to_logits(rows, exit)?;
        if args.iter().any(|a| a.params.repetition_penalty != 1.0) {
            return self.draft_on_host(&args);
        }
        let (stream, vocab) = (self.gpu.stream.clone(), self.spec.vocab_size);
        let size = bucket(rows.len(), self.decode.rows());
        let buffer = self.shelf.take(&stream, size * vocab)?;
        let dense = buffer.device_ptr(&stream).0;
        let mut asks = Asks::default();
        for (row, args) in args.iter().enumerate() {
            asks.draft(args, dense + (row * vocab * size_of::<f32>()) as u64);
        }
        self.draws.send(&self.gpu, &asks)?;
        let logits = self.work.logits.device_ptr(&stream).0;
        self.draws
            .queue(&self.gpu, (logits, vocab), (0, asks.len()), None)?;
        let answers = self.draws.read(&self.gpu, asks.len(), 0)?;
        let drafted = |(row, args): (usize, &&SampleArgs<'_>)| {
            let token = answers.drawn(row, args.position)?.token;
            let buffer = Arc::clone(&buffer);
            let distribution = Distribution::Gpu(DeviceRow { buffer, row, vocab });
            Ok(Drafted {
                token,
                distribution,
            })
        };
        args.iter().enumerate().map(drafted).collect()
    }

    /// Leaves the logits of every row's last token in order.
    fn run_to_logits(&mut self, rows: &[StepRow<'_>], exit: Exit) -> Result<(), PolicyError> {
        let width = rows.iter().map(|row| row.tokens.len()).max().unwrap_or(0);
        let shape = Uniform {
            size: bucket(rows.len(), self.decode.rows()),
            width,
            group: self.group(),
            last_only: true,
        };
        if width > MAX_WIDTH || shape.size * width > self.inputs.tokens() {
            let counts = self
                .inputs
                .fill(&self.gpu.stream, rows, 0, shape.group, None)?;
            let pass = PassArgs {
                counts,
                splits: self.splits(counts.tiles),
                decode: false,
                siblings: None,
                tune: false,
            };
            return self.queue_exit(exit, &pass);
        }
        let counts = self.inputs.fill_uniform(&self.gpu.stream, rows, &shape)?;
        let key = Captured::Propose {
            rows: shape.size,
            width,
            exit,
        };
        if !self.graphs.contains_key(&key) {
            let pass = self.uniform_pass(counts, &shape);
            let graph = self.record(&pass, |backend, pass| backend.queue_exit(exit, pass))?;
            self.graphs.insert(key, graph);
        }
        Ok(self.graphs[&key].launch().map_err(CudaError::from)?)
    }

    fn queue_exit(&mut self, exit: Exit, pass: &PassArgs) -> Result<(), PolicyError> {
        let at = Addresses::of(&self.inputs);
        match exit {
            Exit::Final => {
                self.run_layers(&at, pass)?;
                self.head(&at, pass, 0, pass.counts.sampled)
            }
            Exit::Early => self.run_early_exit(&at, pass),
        }
    }

    /// With a repetition penalty, which needs the text.
    fn draft_on_host(&mut self, args: &[&SampleArgs<'_>]) -> Result<Vec<Drafted>, PolicyError> {
        let logits = self.fetch_logits(args.len())?;
        let draft = |(i, args): (usize, &&SampleArgs<'_>)| sampler::draft(logits.row(i), args);
        args.iter().enumerate().map(draft).collect()
    }
}
