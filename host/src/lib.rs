//! The host: plugins, data, the GRPO mathematics, the run directory and the loop that joins them to
//! `grpo-policy`. ARCHITECTURE.md has the map.

pub mod authoring;
pub mod cases;
pub mod cli;
pub mod commands;
pub mod config;
pub mod data;
pub mod defaults;
pub mod draft;
pub mod error;
pub mod evaluate;
pub mod failures;
pub mod grpo;
pub mod hub;
pub mod interrupt;
pub mod judge;
pub mod placement;
pub mod plugin;
pub mod policy;
pub mod record;
pub mod registry;
pub mod replay;
pub mod replicas;
pub mod role_cases;
pub mod rollout;
pub mod run;
pub mod setup;
pub mod sft;
pub mod speculation;
pub mod swap;
pub mod trainer;
pub mod types;
pub mod update;
