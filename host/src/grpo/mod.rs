//! The GRPO mathematics: advantages, losses, group filtering and the learning-rate schedule.
//!
//! Pure functions over slices, f64 inside. No tensors, no files, no plugins: a backend reports
//! log-probs, this room answers with ∂loss/∂logp, and the backend propagates it.

pub mod advantage;
pub mod config;
pub mod filter;
pub mod loss;
mod objective;
pub mod respend;
pub mod schedule;
pub mod stats;
