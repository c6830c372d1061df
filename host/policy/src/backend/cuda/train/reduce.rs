//! Gradients summed over the GPUs of a run, on a stream of their own: a layer's while the backward pass is at the layer below.
//!
//! Every GPU keeps masters and moments of all weights and updates them with the same sums, so that weights stay equal to the bit
//! and nothing has to be gathered. Dividing the state among the GPUs (ZeRO, Rajbhandari et al. 2020) would save 12 bytes a
//! weight for a gather of the weights at every update; what this backend trains fits without.

use std::{ops::Range, sync::Arc};

use cudarc::driver::CudaStream;

use super::{Mode, Training, layout::Layout, layout::ModelSlots, optimizer::Optimizer};
use crate::{
    backend::cuda::{CudaBackend, CudaError, device::Gpu, nccl::Communicators},
    error::PolicyError,
};

/// See the file header.
pub(in super::super) struct Reducer {
    group: Arc<Communicators>,
    rank: usize,
    stream: Arc<CudaStream>,
    /// Parts of the flat array of gradients, in the order in which a backward pass completes them. All ranks have the same.
    buckets: Vec<Range<usize>>,
    /// Buckets whose sums are queued.
    begun: usize,
    /// The next backward pass is the last one before the update.
    pub(super) last: bool,
    /// An update has been made. The driver loads a kernel when it is first launched, and may wait for all that runs on the GPU to do
    /// so: for a sum that is under way, until the other ranks come. So the first pass has none beside it.
    warm: bool,
}

/// What a backward pass completes: behind the layers, each layer from the last to the first, the embeddings. Adapters are
/// small, and go in one.
fn buckets(layout: &Layout, slots: Option<&ModelSlots>) -> Vec<Range<usize>> {
    let mut end = layout.total();
    let mut buckets = Vec::new();
    let mut cut = |slot: usize| {
        let first = layout.slots[slot].offset;
        buckets.push(first..std::mem::replace(&mut end, first));
    };
    if let Some(slots) = slots {
        cut(slots.norm);
        let layers = slots.layers.iter().rev();
        layers.for_each(|layer| cut(layer.input_norm));
    }
    buckets.push(0..end);
    buckets
}

impl Reducer {
    /// Queues the sums of the first `complete` buckets, as far as they are not; `at` is the flat array's address.
    fn through(&mut self, gpu: &Gpu, at: u64, complete: usize) -> Result<(), PolicyError> {
        if complete <= self.begun {
            return Ok(());
        }
        self.stream.join(&gpu.stream).map_err(CudaError::from)?;
        for bucket in &self.buckets[self.begun..complete] {
            let from = at + (size_of::<f32>() * bucket.start) as u64;
            let sum = (from, bucket.len());
            self.group.all_reduce(self.rank, sum, &self.stream)?;
        }
        self.begun = complete;
        Ok(())
    }

    /// Waits for the sums.
    fn wait(&mut self) -> Result<(), PolicyError> {
        let done = self.stream.synchronize();
        (self.begun, self.warm) = (0, true);
        self.group.check()?;
        Ok(done.map_err(CudaError::from)?)
    }

    /// Sums all gradients of an optimizer that are not summed yet, for its update. Of a rank that had no batch they are 0.
    ///
    /// # Errors
    /// [`PolicyError::RankFailed`] when another rank has given up; what the driver and NCCL say.
    pub(super) fn finish(
        &mut self,
        gpu: &Gpu,
        optimizer: &mut Optimizer,
    ) -> Result<(), PolicyError> {
        optimizer.fill_with_zeros(gpu)?;
        self.last = false;
        let at = optimizer.gradients(gpu).0;
        self.through(gpu, at, self.buckets.len())?;
        self.wait()
    }

    /// The same for an optimizer beside that of the model.
    pub(super) fn finish_beside(
        &mut self,
        gpu: &Gpu,
        optimizer: &mut Optimizer,
    ) -> Result<(), PolicyError> {
        optimizer.fill_with_zeros(gpu)?;
        let sum = optimizer.gradients(gpu);
        self.stream.join(&gpu.stream).map_err(CudaError::from)?;
        self.group.all_reduce(self.rank, sum, &self.stream)?;
        let begun = self.begun;
        self.wait()?;
        self.begun = begun;
        Ok(())
    }
}

impl Training {
    /// Queues the sums of the `complete` first buckets in the last backward pass before an update.
    pub(super) fn reduce(&mut self, gpu: &Gpu, complete: usize) -> Result<(), PolicyError> {
        let (Some(reducer), Some(optimizer)) = (&mut self.reducer, &self.optimizer) else {
            return Ok(());
        };
        let per_layer = reducer.buckets.len() > 1;
        match reducer.last && reducer.warm && per_layer {
            true => reducer.through(gpu, optimizer.gradients(gpu).0, complete),
            false => Ok(()),
        }
    }

    /// # Errors
    /// [`PolicyError::Misuse`] once sums have begun: what a pass adds would be lost or counted for every rank.
    pub(super) fn check_not_reducing(&self) -> Result<(), PolicyError> {
        match &self.reducer {
            Some(reducer) if reducer.begun > 0 => Err(PolicyError::Misuse(
                "a backward pass after the last one before an update",
            )),
            _ => Ok(()),
        }
    }
}

impl CudaBackend {
    /// Makes backends of one model that trains, each on a GPU of its own, sum their gradients from now on.
    ///
    /// # Errors
    /// [`CudaError::Library`] without NCCL; [`PolicyError::Misuse`] for a model that does not train; what NCCL says.
    pub(crate) fn join(ranks: &mut [&mut Self]) -> Result<Arc<Communicators>, PolicyError> {
        let ordinal = |backend: &&mut Self| backend.gpu.stream.context().ordinal();
        let ordinals: Vec<usize> = ranks.iter().map(ordinal).collect();
        let group = Arc::new(Communicators::new(&ordinals)?);
        for (rank, backend) in ranks.iter_mut().enumerate() {
            let stream = backend.gpu.stream.context().new_stream();
            let stream = stream.map_err(CudaError::from)?;
            let (training, _) = backend.with_training()?;
            let slots = match training.mode {
                Mode::Full { .. } => Some(&training.slots),
                Mode::Nothing | Mode::Lora(_) => None,
            };
            training.reducer = Some(Reducer {
                buckets: buckets(&training.trains()?.layout, slots),
                group: group.clone(),
                rank,
                stream,
                begun: 0,
                last: false,
                warm: false,
            });
        }
        let parts = ranks.first().map_or(0, |first| first.buckets().len());
        for part in 0..parts {
            let sums = ranks.iter().map(|backend| {
                let (training, on) = backend.trained()?;
                let reducer = training.reducer.as_ref().ok_or(super::NOTHING_TRAINS)?;
                let bucket = &reducer.buckets[part];
                let at = training.trains()?.gradients(on.gpu).0 + 4 * bucket.start as u64;
                Ok((at, bucket.len(), &*reducer.stream))
            });
            // Of gradients that are all 0 so far.
            group.connect(&sums.collect::<Result<Vec<_>, PolicyError>>()?)?;
        }
        for backend in ranks.iter() {
            if let Some(reducer) = backend.training.as_ref().and_then(|t| t.reducer.as_ref()) {
                reducer.stream.synchronize().map_err(CudaError::from)?;
            }
        }
        Ok(group)
    }

    fn buckets(&self) -> &[Range<usize>] {
        let reducer = self.training.as_ref().and_then(|t| t.reducer.as_ref());
        reducer.map_or(&[], |reducer| &reducer.buckets)
    }

    /// [`crate::backend::Backend::expect_update`].
    pub(in super::super) fn reduce_with_next_backward(&mut self) {
        let training = self.training.as_mut();
        if let Some(reducer) = training.and_then(|t| t.reducer.as_mut()) {
            reducer.last = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::cuda::train::layout,
        spec::{Family, ModelSpec},
    };

    fn spec(tied: bool) -> ModelSpec {
        ModelSpec {
            family: Family::Qwen2,
            vocab_size: 11,
            hidden_size: 64,
            intermediate_size: 96,
            num_hidden_layers: 3,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 32,
            max_position_embeddings: 64,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
            rope_scaling: None,
            tie_word_embeddings: tied,
            qkv_bias: true,
            o_bias: false,
            qk_norm: false,
        }
    }

    #[test]
    fn buckets_are_the_whole_array_once_and_hold_whole_slots() {
        for tied in [true, false] {
            let (layout, slots) = layout::of_model(&spec(tied));
            let buckets = buckets(&layout, Some(&slots));
            assert_eq!(buckets.len(), 5);
            let mut sorted = buckets.clone();
            sorted.sort_by_key(|bucket| bucket.start);
            assert_eq!(sorted[0].start, 0);
            assert_eq!(sorted[4].end, layout.total());
            assert!(sorted.windows(2).all(|w| w[0].end == w[1].start));
            let holder = |slot: usize| {
                let slot = &layout.slots[slot];
                let holds =
                    |b: &Range<usize>| b.start <= slot.offset && slot.offset + slot.len <= b.end;
                buckets.iter().position(holds).unwrap()
            };
            assert_eq!(holder(slots.norm), 0);
            assert_eq!(holder(slots.head), if tied { 4 } else { 0 });
            assert_eq!(holder(slots.embed), 4);
            for (index, layer) in slots.layers.iter().enumerate() {
                for slot in [
                    layer.input_norm,
                    layer.qkv,
                    layer.o,
                    layer.gate_up,
                    layer.down,
                ] {
                    assert_eq!(holder(slot), 3 - index, "layer {index}");
                }
            }
        }
    }

    #[test]
    fn adapters_are_one_bucket() {
        let layout = Layout::of_matrices(&[("a", 8, 64), ("b", 32, 8)]);
        let whole = 0..layout.total();
        assert_eq!(buckets(&layout, None), std::slice::from_ref(&whole));
    }
}
