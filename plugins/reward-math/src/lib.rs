//! Rewards a completion whose number equals the one in the dataset row, compared exactly.

pub mod judge;
pub mod number;

#[cfg(target_arch = "wasm32")]
mod guest;
