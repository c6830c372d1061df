//! Verification of drafted tokens, one captured graph for each size of batch and longest proposal; and draws on the device
//! for passes of any shape.

use cudarc::driver::{CudaSlice, DevicePtr};

use super::{
    CudaBackend, CudaError,
    draws::{Answers, Asks},
    forward::{Addresses, PassArgs},
    graph::{Captured, bucket},
    inputs::Uniform,
};
use crate::{
    backend::{SampleArgs, Sampled, StepRow},
    engine::sampler::Distribution,
    error::PolicyError,
};

/// Longest proposal that is verified by a graph.
const MAX_PROPOSED: usize = 8;

/// Tokens of a row in the graph that serves proposals of up to `proposed`: few, because each is captured for itself.
fn width(proposed: usize) -> usize {
    match proposed {
        0..=4 => 1 + proposed,
        5..=6 => 7,
        _ => 9,
    }
}

impl CudaBackend {
    /// The shape of the graph that serves these rows; `None` where none does: a row has more than one token beside its
    /// proposal, or nothing is proposed, or too much.
    fn verify_shape(&self, rows: &[StepRow<'_>]) -> Option<Uniform> {
        let proposed = |row: &StepRow<'_>| {
            let args = row.sample.as_ref()?;
            let proposed = args.proposal.map_or(0, |p| p.tokens.len());
            (row.tokens.len() == 1 + proposed).then_some(proposed)
        };
        let longest = rows
            .iter()
            .map(proposed)
            .try_fold(0, |most, n| Some(most.max(n?)))?;
        let size = bucket(rows.len(), self.decode.rows());
        let shape = Uniform {
            size,
            width: width(longest),
            group: self.group(),
            last_only: false,
        };
        let fits = shape.size * shape.width <= self.inputs.tokens();
        ((1..=MAX_PROPOSED).contains(&longest) && fits).then_some(shape)
    }

    /// Runs rows with proposals as a graph where there is one for them. `None`: nothing was done.
    pub(super) fn verify_rows(
        &mut self,
        rows: &[StepRow<'_>],
    ) -> Result<Option<Vec<Vec<Sampled>>>, PolicyError> {
        let Some(shape) = self.verify_shape(rows) else {
            return Ok(None);
        };
        let (mut asks, mut uploads) = (Asks::default(), Vec::new());
        let args: Vec<_> = rows.iter().filter_map(|row| row.sample.as_ref()).collect();
        for (i, args) in args.iter().enumerate() {
            let q = self.addresses(args, &mut uploads)?;
            asks.verify(args, &q);
            asks.pad((i + 1) * shape.width);
        }
        asks.pad(shape.size * shape.width);
        let counts = self.inputs.fill_uniform(&self.gpu.stream, rows, &shape)?;
        self.draws.send(&self.gpu, &asks)?;
        let key = Captured::Verify {
            rows: shape.size,
            width: shape.width,
        };
        if !self.graphs.contains_key(&key) {
            let pass = self.uniform_pass(counts, &shape);
            let graph = self.record(&pass, Self::queue_verification)?;
            self.graphs.insert(key, graph);
        }
        self.graphs[&key].launch().map_err(CudaError::from)?;
        let answers = self.draws.read(&self.gpu, asks.len(), asks.len())?;
        let of_row = |(i, args): (usize, &&SampleArgs<'_>)| {
            answers.verified(i * shape.width, args.proposal, args.position)
        };
        args.iter()
            .enumerate()
            .map(of_row)
            .collect::<Result<_, _>>()
            .map(Some)
    }

    /// How a pass of such a shape runs.
    pub(super) fn uniform_pass(&self, counts: super::inputs::Counts, shape: &Uniform) -> PassArgs {
        PassArgs {
            counts,
            splits: self.splits(counts.tiles),
            decode: shape.width == 1,
            siblings: None,
            tune: true,
        }
    }

    fn queue_verification(&mut self, pass: &PassArgs) -> Result<(), PolicyError> {
        let at = Addresses::of(&self.inputs);
        self.run_layers(&at, pass)?;
        self.queue_decisions(&at, pass)
    }

    /// Logits of all sampled tokens, as many at a time as there is room for, and what was asked of them.
    fn queue_decisions(&mut self, at: &Addresses, pass: &PassArgs) -> Result<(), PolicyError> {
        for first in (0..pass.counts.sampled).step_by(self.work.max_rows) {
            let n = self.work.max_rows.min(pass.counts.sampled - first);
            self.head(at, pass, first, n)?;
            let logits = self.work.logits.device_ptr(&self.gpu.stream).0;
            let of = (logits, self.spec.vocab_size);
            self.draws.queue(&self.gpu, of, (first, n), None)?;
        }
        Ok(())
    }

    /// Draws and verifies behind a pass of any shape.
    pub(super) fn decide_on_device(
        &mut self,
        at: &Addresses,
        pass: &PassArgs,
        args: &[&SampleArgs<'_>],
    ) -> Result<Vec<Vec<Sampled>>, PolicyError> {
        let (mut asks, mut uploads) = (Asks::default(), Vec::new());
        let mut firsts = Vec::with_capacity(args.len());
        for args in args {
            firsts.push(asks.len());
            let q = self.addresses(args, &mut uploads)?;
            asks.verify(args, &q);
        }
        self.draws.send(&self.gpu, &asks)?;
        self.queue_decisions(at, pass)?;
        let answers: Answers = self.draws.read(&self.gpu, asks.len(), asks.len())?;
        let of_row = |(args, first): (&&SampleArgs<'_>, usize)| {
            answers.verified(first, args.proposal, args.position)
        };
        args.iter().zip(firsts).map(of_row).collect()
    }

    /// Where the probabilities of a proposal lie on this GPU. What is not there is uploaded, and stays as long as `uploads`.
    fn addresses(
        &self,
        args: &SampleArgs<'_>,
        uploads: &mut Vec<CudaSlice<f32>>,
    ) -> Result<Vec<u64>, PolicyError> {
        let stream = &self.gpu.stream;
        let of = |q: &Distribution| -> Result<u64, PolicyError> {
            if let Distribution::Gpu(row) = q
                && let Some(address) = row.address_on(stream, self.spec.vocab_size)
            {
                return Ok(address);
            }
            let dense = q.dense()?;
            if dense.len() != self.spec.vocab_size {
                let draft = dense.len();
                let policy = self.spec.vocab_size;
                return Err(PolicyError::DraftVocabulary { draft, policy });
            }
            let upload = stream.clone_htod(&dense[..]).map_err(CudaError::from)?;
            let address = upload.device_ptr(stream).0;
            uploads.push(upload);
            Ok(address)
        };
        let probabilities = args.proposal.map_or(&[][..], |p| &p.probabilities);
        probabilities.iter().map(of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_PROPOSED, width};

    #[test]
    fn widths_hold_every_proposal_and_one_token_more() {
        for proposed in 1..=MAX_PROPOSED {
            assert!((1 + proposed..=3 + proposed).contains(&width(proposed)));
        }
    }
}
