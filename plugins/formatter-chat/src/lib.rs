//! Fills a message template from a row, and splits completions into reasoning and answer.

pub mod split;
pub mod template;

#[cfg(target_arch = "wasm32")]
mod guest;
