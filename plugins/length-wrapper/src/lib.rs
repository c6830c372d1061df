//! Wraps any reward and makes what it says depend on the completion's length: right answers are worth more when they are short,
//! wrong ones lose less when they are long (the model should go on thinking).
//!
//! The component imports `scoring` and exports it again, so the host cannot run it before a reward has
//! been composed into it (`cargo xtask compose`).

pub mod curve;

#[cfg(target_arch = "wasm32")]
mod guest;
