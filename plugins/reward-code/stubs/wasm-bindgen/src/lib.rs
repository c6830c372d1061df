//! The one name of `wasm-bindgen` that `chrono` mentions.

/// A number, since nothing else is made of it.
pub struct JsValue(f64);

impl JsValue {
    /// Wraps a number.
    pub fn from_f64(value: f64) -> Self {
        Self(value)
    }

    /// The number again.
    pub fn as_f64(&self) -> Option<f64> {
        Some(self.0)
    }
}
