//! `Date` as far as `chrono` mentions it. The interpreter never asks `chrono` for the time; whoever did would read 1970.

use wasm_bindgen::JsValue;

/// Milliseconds since 1970.
pub struct Date(f64);

impl Date {
    /// The moment that is always now.
    pub fn new_0() -> Self {
        Self(0.0)
    }

    /// The moment of a number of milliseconds.
    pub fn new(millis: &JsValue) -> Self {
        Self(millis.as_f64().unwrap_or(0.0))
    }

    /// There is no calendar here.
    pub fn new_with_year_month_day_hr_min_sec(
        _: u32,
        _: i32,
        _: i32,
        _: i32,
        _: i32,
        _: i32,
    ) -> Self {
        Self(0.0)
    }

    /// Milliseconds since 1970.
    pub fn get_time(&self) -> f64 {
        self.0
    }

    /// UTC.
    pub fn get_timezone_offset(&self) -> f64 {
        0.0
    }
}
