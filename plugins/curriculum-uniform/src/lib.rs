//! Every row once per epoch, in an order shuffled by the run's seed, with groups of one size.

#[cfg(target_arch = "wasm32")]
mod guest;
