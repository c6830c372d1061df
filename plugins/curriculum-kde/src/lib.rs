//! Hard rows get more completions: rows fall into buckets between the valleys of the density of their
//! rewards, and a bucket's completions grow as its mean reward falls.

pub mod buckets;
pub mod density;
pub mod plan;
pub mod report;
pub mod state;

#[cfg(target_arch = "wasm32")]
mod guest;
