//! What the binary carries so that it runs without any file: the shipped plugins and the arithmetic
//! task (`examples/arith`) with its tiny model and config.

use std::borrow::Cow;

use grpo_policy::{
    error::PolicyError,
    weights::{self, LoadedModel},
};

use crate::{
    config::{ConfigError, RawConfig},
    data::{DataError, Dataset, LoadOptions, parse_jsonl},
};

/// The shipped components by name, but for those that are packed.
pub const COMPONENTS: [(&str, &[u8]); 12] = [
    (
        "reward-math",
        include_bytes!("../../plugins/dist/reward-math.wasm"),
    ),
    (
        "reward-format",
        include_bytes!("../../plugins/dist/reward-format.wasm"),
    ),
    (
        "reward-inference",
        include_bytes!("../../plugins/dist/reward-inference.wasm"),
    ),
    (
        "reward-math-inference",
        include_bytes!("../../plugins/dist/reward-math-inference.wasm"),
    ),
    (
        "reward-length",
        include_bytes!("../../plugins/dist/reward-length.wasm"),
    ),
    (
        "reward-math-length",
        include_bytes!("../../plugins/dist/reward-math-length.wasm"),
    ),
    (
        "reward-repetition",
        include_bytes!("../../plugins/dist/reward-repetition.wasm"),
    ),
    (
        "reward-judge",
        include_bytes!("../../plugins/dist/reward-judge.wasm"),
    ),
    (
        "reward-geo",
        include_bytes!("../../plugins/dist/reward-geo.wasm"),
    ),
    (
        "formatter-chat",
        include_bytes!("../../plugins/dist/formatter-chat.wasm"),
    ),
    (
        "curriculum-uniform",
        include_bytes!("../../plugins/dist/curriculum-uniform.wasm"),
    ),
    (
        "curriculum-kde",
        include_bytes!("../../plugins/dist/curriculum-kde.wasm"),
    ),
];

/// Shipped components that are kept compressed (zstd), since they bring an interpreter.
const PACKED: [(&str, &[u8]); 1] = [(
    "reward-code",
    include_bytes!("../../plugins/dist/reward-code.wasm.zst"),
)];

/// The names of all shipped components.
pub fn names() -> impl Iterator<Item = &'static str> {
    let plain = COMPONENTS.iter().map(|(name, _)| *name);
    plain.chain(PACKED.iter().map(|(name, _)| *name))
}

/// The bytes of any shipped component by its name, those of [`component`] and those that have to be unpacked.
///
/// # Errors
/// Never, unless the program itself is damaged.
pub fn shipped(name: &str) -> std::io::Result<Option<Cow<'static, [u8]>>> {
    if let Some(bytes) = component(name) {
        return Ok(Some(bytes.into()));
    }
    let packed = PACKED.iter().find(|(packed, _)| *packed == name);
    let unpacked = packed.map(|(_, bytes)| zstd::decode_all(*bytes));
    Ok(unpacked.transpose()?.map(Cow::from))
}

/// The bytes of a shipped component by its name, but for those that are packed, or `None` if there is none of that name.
pub fn component(name: &str) -> Option<&'static [u8]> {
    COMPONENTS
        .iter()
        .find(|(shipped, _)| *shipped == name)
        .map(|(_, bytes)| *bytes)
}

/// The arithmetic model: 0.8 M parameters, made by `sft` (see `examples/arith/README.md`).
pub fn model() -> Result<LoadedModel, PolicyError> {
    weights::from_bytes(
        include_bytes!("../../examples/arith/model/config.json"),
        include_bytes!("../../examples/arith/model/model.safetensors"),
        include_bytes!("../../examples/arith/model/tokenizer.json"),
        include_bytes!("../../examples/arith/model/tokenizer_config.json"),
    )
}

/// Its draft: 66 thousand parameters, the same tokenizer, made the same way.
pub fn draft() -> Result<LoadedModel, PolicyError> {
    weights::from_bytes(
        include_bytes!("../../examples/arith/draft/config.json"),
        include_bytes!("../../examples/arith/draft/model.safetensors"),
        include_bytes!("../../examples/arith/model/tokenizer.json"),
        include_bytes!("../../examples/arith/model/tokenizer_config.json"),
    )
}

/// The arithmetic problems to train on.
pub fn train_rows() -> Result<Dataset, DataError> {
    let text = include_str!("../../examples/arith/train.jsonl");
    parse_jsonl(text, "embedded train.jsonl", &LoadOptions::default())
}

/// Arithmetic problems that are in no training data.
pub fn heldout_rows() -> Result<Dataset, DataError> {
    let text = include_str!("../../examples/arith/heldout.jsonl");
    parse_jsonl(text, "embedded heldout.jsonl", &LoadOptions::default())
}

/// The config of the arithmetic run, under every other setting when no model is named.
pub fn config() -> Result<RawConfig, ConfigError> {
    RawConfig::from_yaml(
        include_str!("../../examples/arith/run.yaml"),
        "examples/arith/run.yaml",
    )
}
