//! Rewards a completion by its length in tokens alone.

pub mod form;

#[cfg(target_arch = "wasm32")]
mod guest;
