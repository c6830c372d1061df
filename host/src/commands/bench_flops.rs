//! Operations of a training step, and how near they come to what a GPU's tensor cores can do.

use grpo_policy::spec::ModelSpec;

/// Dense bf16 operations per second of NVIDIA's data sheets, by what the driver calls the GPU; those before come first.
const PEAKS: [(&str, f64); 8] = [
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
];

/// What the GPU could do; `None` for one that is not listed.
pub(super) fn peak(device: &str) -> Option<f64> {
    let found = PEAKS.iter().find(|(name, _)| device.contains(name));
    found.map(|(_, peak)| *peak)
}

/// Operations of a step on `batch` sequences of `tokens` tokens: two a weight and token in the forward pass, as many for the
/// gradient of the activations and as many for that of each weight that trains (Kaplan et al. 2020), and attention's, of
/// which a causal mask leaves half (as FlashAttention counts them). What is made again is not counted. `adapters` is the
/// number of LoRA's weights where those train alone.
pub(super) fn step_flops(
    spec: &ModelSpec,
    adapters: Option<usize>,
    (batch, tokens): (usize, usize),
) -> f64 {
    let of_layer: usize = spec
        .linears(0)
        .iter()
        .map(|(_, rows, columns, _)| rows * columns)
        .sum();
    let matrices = spec.num_hidden_layers * of_layer + spec.vocab_size * spec.hidden_size;
    let a_token = match adapters {
        None => 6 * matrices,
        Some(adapters) => 4 * matrices + 6 * adapters,
    };
    let attention = 6 * spec.num_hidden_layers * spec.q_dim() * tokens;
    (batch * tokens) as f64 * (a_token + attention) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_by_hand() {
        let text = include_bytes!("shapes/qwen2.5-0.5b.json");
        let spec = ModelSpec::from_config_json(text, std::path::Path::new("config.json")).unwrap();
        // 24 · (896 · (896 + 2 · 128) + 896² + 3 · 896 · 4864) + 151,936 · 896 weights in matrices.
        let matrices = 24.0 * (1_032_192.0 + 802_816.0 + 13_074_432.0) + 136_134_656.0;
        let attention = 6.0 * 24.0 * 896.0 * 384.0;
        let full = step_flops(&spec, None, (64, 384));
        assert_eq!(full, 24_576.0 * (6.0 * matrices + attention));
        let lora = step_flops(&spec, Some(1000), (64, 384));
        assert_eq!(lora, 24_576.0 * (4.0 * matrices + 6000.0 + attention));
    }

    #[test]
    fn the_peak_is_that_of_the_very_gpu() {
        assert_eq!(peak("cuda:0 NVIDIA H100 PCIe"), Some(756e12));
        assert_eq!(peak("cuda:0 NVIDIA H100 80GB HBM3"), Some(989e12));
        assert_eq!(peak("cuda:0 NVIDIA H200"), Some(989e12));
        assert_eq!(peak("cpu"), None);
    }
}
