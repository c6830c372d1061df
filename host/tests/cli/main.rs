//! The program as its users run it: exit codes, messages, JSON, and runs that are stopped and resumed.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy counts only functions marked as tests as tests"
)]

mod authoring;
mod bad_input;
mod budget;
mod contract;
mod device;
mod drafts;
#[path = "../../../tests/tests/hostile/guest.rs"]
#[allow(dead_code, reason = "the hostile suite uses the rest")]
mod guest;
mod hostile;
mod judged;
mod judges;
#[path = "../../../tests/tests/hostile/judging.rs"]
mod judging;
mod lab;
mod replay;
mod resume;
#[path = "../../../tests/tests/hostile/role_guests.rs"]
mod role_guests;
#[path = "../../../tests/tests/judge/server.rs"]
#[allow(dead_code, reason = "the judges' own tests use the rest")]
mod server;
mod sharing;
mod speculation;
mod stop;
mod swap;
mod swap_roles;
