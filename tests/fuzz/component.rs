//! libFuzzer's view of `fuzz::components`.
#![no_main]

#[path = "harness/mod.rs"]
#[allow(dead_code, reason = "the harness of the other target")]
mod fuzz;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::components::run(data));
