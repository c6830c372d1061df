//! The engine against naive generation, on a backend whose answers depend on every key it can reach.

mod cases;
mod early_exit;
mod scripted;
mod speculation;
mod workload;
