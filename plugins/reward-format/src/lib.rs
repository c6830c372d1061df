//! Rewards the shape of a completion: tags in order, a regular expression, a length.

pub mod shape;

#[cfg(target_arch = "wasm32")]
mod guest;
