//! The engine against naive generation, on a backend whose answers depend on every key it can reach.

mod ahead;
mod cases;
mod early_exit;
mod failing_drafts;
mod scripted;
mod speculation;
mod workload;
