//! Runs the code that a model wrote against the row's tests; the reward is the share of tests that pass.
//!
//! The language is Python as `monty` has it: an interpreter of a subset of Python in Rust, made for code from models,
//! without file, clock or network of its own. Starlark has no `while`, `import`, `try` or classes, and Rhai is no Python at
//! all; hardly an answer of a model would have run. RustPython is nearer to Python, but has no limit of steps or memory.
//!
//! What `monty` 0.0.23 does not have: generators (`yield`), `del`, `match`, `async for` and `async with`, inheritance,
//! decorated methods (`property`, `staticmethod`), complex numbers, and all modules but asyncio, base64, binascii,
//! collections, dataclasses, datetime, functools, gc, itertools, json, math, os, pathlib, re, sys, typing and unicodedata.
//! Code that fails for such a reason is skipped and not called wrong, where it can be told apart: see `run::Failure`.

pub mod nesting;
pub mod program;
pub mod run;

#[cfg(target_arch = "wasm32")]
mod guest;
