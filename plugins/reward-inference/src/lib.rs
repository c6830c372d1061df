//! Rewards a completion for what it cost to generate: the terms of `inference-cost`, alone.

#[cfg(target_arch = "wasm32")]
mod guest;
