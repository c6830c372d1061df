//! libFuzzer's view of `fuzz::verdicts`.
#![no_main]

#[path = "harness/mod.rs"]
#[allow(dead_code, reason = "the harness of the other target")]
mod fuzz;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::verdicts::run(data));
