//! What the binary carries so that it runs without any file: the shipped plugins.

/// The bytes of a shipped component by its name, or `None` if there is none of that name.
pub fn component(name: &str) -> Option<&'static [u8]> {
    Some(match name {
        "reward-math" => include_bytes!("../../plugins/dist/reward-math.wasm"),
        "reward-format" => include_bytes!("../../plugins/dist/reward-format.wasm"),
        "formatter-chat" => include_bytes!("../../plugins/dist/formatter-chat.wasm"),
        "curriculum-uniform" => include_bytes!("../../plugins/dist/curriculum-uniform.wasm"),
        _ => return None,
    })
}
