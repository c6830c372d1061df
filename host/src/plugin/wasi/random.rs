//! Bytes that look random and are the same in every fresh instance: SHA-256 of a counter.
//!
//! Nothing that must be kept secret may rest on them.

use super::super::sandbox::CallState;
use super::{Functions, Stop};
use sha2::{Digest, Sha256};

/// What all bytes follow from.
const SEED: &[u8] = b"grpo-host wasi 0.2";
/// Bytes that one call may ask for. Guests seed generators with it.
const MOST: u64 = 1 << 20;

/// How many blocks of 32 bytes were drawn.
#[derive(Default)]
pub(super) struct Random(u64);

impl Random {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.fill(&mut bytes);
        bytes
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(32) {
            let block = Sha256::new()
                .chain_update(SEED)
                .chain_update(self.0.to_le_bytes())
                .finalize();
            self.0 += 1;
            chunk.copy_from_slice(&block[..chunk.len()]);
        }
    }
}

pub(super) fn random(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    add(functions, ["get-random-bytes", "get-random-u64"])
}

pub(super) fn insecure(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    let names = ["get-insecure-random-bytes", "get-insecure-random-u64"];
    add(functions, names)
}

fn add(functions: &mut Functions<'_>, [bytes, word]: [&'static str; 2]) -> wasmtime::Result<()> {
    functions.add(bytes, move |state: &mut CallState, (asked,): (u64,)| {
        let size = Stop::Size {
            function: bytes,
            asked,
            most: MOST,
        };
        let length = usize::try_from(asked).ok().filter(|_| asked <= MOST);
        let mut all = vec![0; length.ok_or(size)?];
        state.wasi.random.fill(&mut all);
        Ok((all,))
    })?;
    functions.add(word, |state, ()| {
        Ok((u64::from_le_bytes(state.wasi.random.bytes()),))
    })
}

pub(super) fn insecure_seed(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    functions.add("insecure-seed", |state, ()| {
        let random = &mut state.wasi.random;
        let [a, b] = [(); 2].map(|()| u64::from_le_bytes(random.bytes()));
        Ok(((a, b),))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_drawn_once_and_repeat_in_another_instance() {
        let mut random = Random::default();
        let mut first = [0; 100];
        random.fill(&mut first);
        let next: [u8; 32] = random.bytes();
        assert!(first.windows(32).all(|window| window != next));
        assert_ne!(first[..32], first[32..64]);
        let mut again = [0; 100];
        Random::default().fill(&mut again);
        assert_eq!(again, first);
    }
}
