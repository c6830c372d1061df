//! Wraps any reward and adds the terms of `inference-cost` to what it says.
//!
//! The component imports `scoring` and exports it again, so the host cannot run it before a reward has
//! been composed into it (`cargo xtask compose`).

pub mod join;

#[cfg(target_arch = "wasm32")]
mod guest;
