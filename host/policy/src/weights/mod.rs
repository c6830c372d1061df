//! Stub.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    pub r: usize,
    pub alpha: f32,
    pub targets: Vec<String>,
}
impl LoraConfig {
    pub fn targets(&self, name: &str) -> bool {
        self.targets
            .iter()
            .any(|t| t == "all-linear" || name.ends_with(t.as_str()))
    }
    pub fn scale(&self) -> f32 {
        self.alpha / self.r as f32
    }
}
