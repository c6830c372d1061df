//! Generated components: any that is valid, those of our worlds with random code inside, and shipped ones with other bytes.

use super::exercise;
use super::verdicts::{SHAPES, Shape, componentize};
use arbitrary::{Result, Unstructured};
use grpo_host::defaults;
use grpo_host::plugin::Isolation;
use serde_json::{Value, json};
use wasm_smith::{Component, Config, Module};

/// The first byte chooses the kind; the rest is what the component is made of.
pub fn run(data: &[u8]) {
    let Some(first) = data.first() else { return };
    // Too little data for a component is no finding.
    let Some((bytes, config)) = generate(data).ok().flatten() else {
        return;
    };
    let isolation = [Isolation::Batch, Isolation::Sample][usize::from(first >> 7)];
    exercise::component(&bytes, &config, &["", "a text", "{\"a\": 1}"], isolation);
}

fn generate(data: &[u8]) -> Result<Option<(Vec<u8>, Value)>> {
    let mut from = Unstructured::new(data);
    let kind: u8 = from.arbitrary()?;
    Ok(Some(match kind & 3 {
        0 => (Component::new(small(), &mut from)?.to_bytes(), json!({})),
        1 | 2 => {
            let shape = &SHAPES[usize::from(kind >> 2) % 3];
            match componentize(shape, inhabited(shape, &mut from)?) {
                Ok(bytes) => (bytes, json!({"a": [1, null]})),
                Err(_) => return Ok(None),
            }
        }
        _ => (changed(&mut from)?, json!({})),
    }))
}

/// What the engine's features allow; whatever else is refused is tested by hand.
fn small() -> Config {
    Config {
        exceptions_enabled: false,
        gc_enabled: false,
        memory64_enabled: false,
        relaxed_simd_enabled: false,
        simd_enabled: false,
        tail_call_enabled: false,
        threads_enabled: false,
        max_memory32_bytes: 4 << 20,
        max_instructions: 200,
        max_funcs: 20,
        ..Config::default()
    }
}

/// A module with the exports of a world and random code behind them.
fn inhabited(shape: &Shape, from: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let function = |name: &str, parameters: &str| {
        format!(r#"(func (export "{name}") (param {parameters}) (result i32) unreachable)"#)
    };
    let named = |(name, parameters, _): &(&str, &str, &str)| {
        function(&format!("{}#{name}", shape.interface), parameters)
    };
    let exports = format!(
        r#"(module (memory (export "memory") 1 64) {} {} {})"#,
        function("cabi_realloc", "i32 i32 i32 i32"),
        function(&format!("{}#configure", shape.interface), "i32 i32"),
        shape.functions.iter().map(named).collect::<String>(),
    );
    let config = Config {
        exports: Some(wat::parse_str(exports).expect("the exports are WAT")),
        max_imports: 0,
        ..small()
    };
    Ok(Module::new(config, from)?.to_bytes())
}

/// A shipped component with some bytes changed and perhaps its end cut off.
fn changed(from: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let (_, bytes) = *from.choose(&defaults::COMPONENTS)?;
    let mut bytes = bytes.to_vec();
    if from.ratio(1, 8)? {
        bytes.truncate(from.int_in_range(0..=bytes.len())?);
    }
    while !from.is_empty() && !bytes.is_empty() {
        let place = from.int_in_range(0..=bytes.len() - 1)?;
        bytes[place] = from.arbitrary()?;
    }
    Ok(bytes)
}
