//! Who has the memory of keys and values: rollouts, or the passes that train on what they wrote.

use cudarc::driver::DevicePtr;

use super::{
    MAX_TOKENS, On, Training,
    arena::{Arena, Sizes},
};
use crate::{
    backend::cuda::{CudaBackend, CudaError},
    error::PolicyError,
    spec::ModelSpec,
};

/// Memory that training passes and rollouts use in turns: neither needs what the other leaves there, since an update makes keys
/// and values worthless, and a rollout begins after it.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Room {
    pub(in super::super) base: u64,
    pub(in super::super) bytes: usize,
}

impl Training {
    /// Makes room for a pass of `tokens` tokens, which forgets the last one.
    pub(super) fn reserve(&mut self, on: On<'_>, tokens: usize) -> Result<(), CudaError> {
        if tokens <= self.arena.tokens {
            return Ok(());
        }
        let (what, most) = ("tokens", MAX_TOKENS);
        if tokens > most {
            let asked = tokens;
            return Err(CudaError::Capacity { what, asked, most });
        }
        // The old one is freed first: both might not fit. Without a new one there is room for nothing.
        self.forget();
        let arena = Arena::new(
            on.spec,
            &Sizes {
                tokens: tokens.max(self.sizes.tokens),
                ..self.sizes
            },
        );
        let base = match on.room.filter(|room| arena.bytes <= room.bytes) {
            Some(room) => room.base,
            None => {
                let buffer = on.gpu.stream.alloc_zeros::<u8>(arena.bytes)?;
                let base = buffer.device_ptr(&on.gpu.stream).0;
                self.buffer = Some(buffer);
                base
            }
        };
        self.arena = arena.at(base);
        self.sizes.tokens = self.arena.tokens;
        let ones = vec![1f32; self.arena.chunk_rows];
        on.gpu.write(self.arena.ones, &ones)
    }

    /// Forgets what passes have left, and has room for none until the next [`Training::reserve`].
    fn forget(&mut self) {
        (self.saved, self.logits) = (None, None);
        self.buffer = None;
        self.arena.tokens = 0;
    }

    /// Forgets what passes have left where keys and values go: so many bytes.
    fn leave(&mut self) -> usize {
        if self.buffer.is_some() || self.arena.tokens == 0 {
            return 0;
        }
        self.forget();
        self.arena.bytes
    }

    /// Bytes of passes of the planned length; 0 where none are planned.
    fn arena_bytes(&self, spec: &ModelSpec) -> usize {
        match self.sizes.tokens {
            0 => 0,
            _ => Arena::new(spec, &self.sizes).bytes,
        }
    }
}

impl CudaBackend {
    /// For a pass: a burst of decoding steps that is ahead of the host would leave its keys where the pass works.
    pub(super) fn begin_passes(&mut self) -> Result<(&mut Training, On<'_>), PolicyError> {
        self.forget_steps();
        self.with_training()
    }

    /// Makes passes leave the room of keys and values, which afterwards holds zeros: a key that is masked is still multiplied,
    /// and a NaN would survive that.
    pub(in super::super) fn begin_rollouts(&mut self) -> Result<(), CudaError> {
        if let (Some(kv), Some(training)) = (&self.kv, &mut self.training) {
            let written = training.leave().min(kv.used);
            if written > 0 {
                self.gpu.zero(kv.base, written)?;
            }
        }
        Ok(())
    }

    /// Frees memory of passes that is not shared with keys and values; the bytes that they will want to share.
    pub(in super::super) fn free_arena(&mut self) -> usize {
        self.training.as_mut().map_or(0, |training| {
            training.forget();
            training.arena_bytes(&self.spec)
        })
    }

    /// Bytes that passes take in turns with keys and values.
    pub fn activation_bytes(&self) -> usize {
        let training = self.training.as_ref();
        training.map_or(0, |training| training.arena_bytes(&self.spec))
    }
}
