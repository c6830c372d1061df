//! Everything with tensors: model, rollout engine, backends. Knows nothing of plugins, run directories or
//! the network; ARCHITECTURE.md has the layering.

pub mod backend;
pub mod chat;
pub mod engine;
pub mod error;
mod gguf;
pub mod spec;
pub mod tokenizer;
pub mod types;
pub mod weights;
