//! Which weights lie where: buffers as the device has them, q, k, v and gate, up fused, and in them the weights by their
//! checkpoint names. Device-free; splitting and joining are windows of a buffer.

use std::ops::Range;

use crate::{backend::cuda::lora::LayerMatrix, spec::ModelSpec, weights::LoraConfig};

/// Numbers that a buffer starts at a multiple of in the flat arrays of the optimizer: 256 bytes of bf16.
const STEP: usize = 128;

/// A buffer of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// Of its first number in the flat arrays (masters, moments, gradients).
    pub(super) offset: usize,
    pub(super) len: usize,
    /// bf16 with an f32 master, not an f32 vector.
    pub(super) matrix: bool,
}

/// A weight as checkpoints name it: a window of a buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Param {
    pub(super) name: String,
    pub(super) slot: usize,
    /// Of its first number in the slot.
    start: usize,
    rows: usize,
    columns: usize,
    /// Numbers from one row to the next.
    stride: usize,
    vector: bool,
}

impl Param {
    /// Dimensions in a checkpoint.
    pub(super) fn shape(&self) -> Vec<usize> {
        match self.vector {
            true => vec![self.columns],
            false => vec![self.rows, self.columns],
        }
    }

    pub(super) fn count(&self) -> usize {
        self.rows * self.columns
    }

    /// What of the slot has to be moved to have all of it.
    pub(super) fn window(&self) -> Range<usize> {
        self.start..self.start + self.rows * self.stride
    }

    /// The weight out of its window.
    pub(super) fn split<T: Copy>(&self, window: &[T]) -> Vec<T> {
        let rows = window.chunks(self.stride);
        rows.flat_map(|row| &row[..self.columns]).copied().collect()
    }

    /// The weight into its window, whose other numbers stay.
    pub(super) fn join<T: Copy>(&self, values: &[T], window: &mut [T]) {
        let rows = window.chunks_mut(self.stride);
        for (row, values) in rows.zip(values.chunks(self.columns)) {
            row[..self.columns].copy_from_slice(values);
        }
    }
}

/// Buffers and weights of a model, or of adapters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) slots: Vec<Slot>,
    pub(super) params: Vec<Param>,
}

impl Layout {
    /// Numbers of a flat array.
    pub(super) fn total(&self) -> usize {
        self.slots
            .last()
            .map_or(0, |slot| (slot.offset + slot.len).next_multiple_of(STEP))
    }

    /// Numbers that checkpoints have.
    pub(super) fn count(&self) -> usize {
        self.params.iter().map(Param::count).sum()
    }

    pub(super) fn find(&self, name: &str) -> Option<&Param> {
        self.params.iter().find(|param| param.name == name)
    }

    /// Matrices each in a buffer of its own: name, rows, columns.
    #[cfg(test)]
    pub(super) fn of_matrices(matrices: &[(&str, usize, usize)]) -> Self {
        let mut layout = Self::default();
        for (name, rows, columns) in matrices {
            layout.matrix(&[((*name).to_owned(), *rows)], *columns);
        }
        layout
    }

    fn slot(&mut self, len: usize, matrix: bool) -> usize {
        let offset = self.total();
        self.slots.push(Slot {
            offset,
            len,
            matrix,
        });
        self.slots.len() - 1
    }

    fn vector(&mut self, parts: &[(String, usize)]) -> usize {
        let slot = self.slot(parts.iter().map(|(_, n)| n).sum(), false);
        let mut start = 0;
        for (name, n) in parts {
            self.params.push(Param {
                name: name.clone(),
                slot,
                start,
                rows: 1,
                columns: *n,
                stride: *n,
                vector: true,
            });
            start += n;
        }
        slot
    }

    /// Matrices of the same columns, one below the other.
    fn matrix(&mut self, parts: &[(String, usize)], columns: usize) -> usize {
        let rows: usize = parts.iter().map(|(_, rows)| rows).sum();
        let slot = self.slot(rows * columns, true);
        let mut start = 0;
        for (name, rows) in parts {
            self.params.push(Param {
                name: name.clone(),
                slot,
                start,
                rows: *rows,
                columns,
                stride: columns,
                vector: false,
            });
            start += rows * columns;
        }
        slot
    }
}

/// Slots of a decoder layer, as [`super::super::weights::Layer`] has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LayerSlots {
    pub(super) input_norm: usize,
    pub(super) qkv: usize,
    pub(super) qkv_bias: Option<usize>,
    /// Of q, then of k.
    pub(super) head_norms: Option<usize>,
    pub(super) o: usize,
    pub(super) mlp_norm: usize,
    pub(super) gate_up: usize,
    pub(super) down: usize,
}

/// Slots of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ModelSlots {
    pub(super) embed: usize,
    pub(super) layers: Vec<LayerSlots>,
    pub(super) norm: usize,
    /// The embedding's where they are tied.
    pub(super) head: usize,
}

/// The buffers of a model, in the order of [`super::super::weights::Weights::buffers`].
pub(super) fn of_model(spec: &ModelSpec) -> (Layout, ModelSlots) {
    let mut layout = Layout::default();
    let (h, v) = (spec.hidden_size, spec.vocab_size);
    let embed = layout.matrix(&[("model.embed_tokens.weight".to_owned(), v)], h);
    let layers = (0..spec.num_hidden_layers)
        .map(|index| layer(&mut layout, spec, index))
        .collect();
    let norm = layout.vector(&[("model.norm.weight".to_owned(), h)]);
    let head = match spec.tie_word_embeddings {
        true => embed,
        false => layout.matrix(&[("lm_head.weight".to_owned(), v)], h),
    };
    let slots = ModelSlots {
        embed,
        layers,
        norm,
        head,
    };
    (layout, slots)
}

fn layer(layout: &mut Layout, spec: &ModelSpec, index: usize) -> LayerSlots {
    let [q, k, v, o, gate, up, down] = spec.linears(index);
    let name = |part: &str| format!("model.layers.{index}.{part}.weight");
    let (h, d) = (spec.hidden_size, spec.head_dim);
    let weight =
        |(name, rows, _, _): &(String, usize, usize, bool)| (format!("{name}.weight"), *rows);
    let bias = |(name, rows, _, _): &(String, usize, usize, bool)| (format!("{name}.bias"), *rows);
    LayerSlots {
        input_norm: layout.vector(&[(name("input_layernorm"), h)]),
        qkv: layout.matrix(&[&q, &k, &v].map(weight), h),
        qkv_bias: (spec.qkv_bias).then(|| layout.vector(&[&q, &k, &v].map(bias))),
        head_norms: spec.qk_norm.then(|| {
            let norms = ["self_attn.q_norm", "self_attn.k_norm"];
            layout.vector(&norms.map(|norm| (name(norm), d)))
        }),
        o: layout.matrix(&[weight(&o)], spec.q_dim()),
        mlp_norm: layout.vector(&[(name("post_attention_layernorm"), h)]),
        gate_up: layout.matrix(&[&gate, &up].map(weight), h),
        down: layout.matrix(&[weight(&down)], spec.intermediate_size),
    }
}

/// Slots of an early exit's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ExitSlots {
    pub(super) norm: usize,
    pub(super) adapter: usize,
}

/// The buffers of an early exit's head, norm and then adapter.
pub(super) fn of_exit(hidden: usize) -> (Layout, ExitSlots) {
    let mut layout = Layout::default();
    let norm = layout.vector(&[("draft_head.norm.weight".to_owned(), hidden)]);
    let adapter = layout.matrix(&[("draft_head.adapter.weight".to_owned(), hidden)], hidden);
    (layout, ExitSlots { norm, adapter })
}

/// LoRA on one projection that may be a part of a fused matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AdaptedPart {
    /// Name of the projection, without `.weight`.
    pub(super) module: String,
    /// Slot of B, `[rows, rank]`.
    pub(super) b: usize,
    /// Rows of the fused matrix that it adds to.
    pub(super) rows: Range<usize>,
}

/// LoRA on a fused matrix `[outputs, inputs]`: the As of its parts lie one below the other, so that they are one product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Adapted {
    /// `[parts · rank, inputs]`.
    pub(super) a: usize,
    pub(super) parts: Vec<AdaptedPart>,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
}

/// Adapters of a layer's matrices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AdaptedLayer {
    pub(super) qkv: Option<Adapted>,
    pub(super) o: Option<Adapted>,
    pub(super) gate_up: Option<Adapted>,
    pub(super) down: Option<Adapted>,
}

impl AdaptedLayer {
    /// Adapters of one matrix.
    pub(super) fn of(&self, matrix: LayerMatrix) -> &Option<Adapted> {
        match matrix {
            LayerMatrix::Qkv => &self.qkv,
            LayerMatrix::O => &self.o,
            LayerMatrix::GateUp => &self.gate_up,
            LayerMatrix::Down => &self.down,
        }
    }
}

/// Rank that adapters are stored with: whole 16 bytes a row, for the tensor cores; what is added is 0 and stays so, because
/// its gradients are products with zeros.
pub(super) fn stored_rank(r: usize) -> usize {
    r.next_multiple_of(8)
}

/// The buffers of LoRA's matrices, `….lora_A.weight` and `….lora_B.weight`.
pub(super) fn of_adapters(spec: &ModelSpec, config: &LoraConfig) -> (Layout, Vec<AdaptedLayer>) {
    let mut layout = Layout::default();
    let layers = (0..spec.num_hidden_layers)
        .map(|index| {
            let [q, k, v, o, gate, up, down] = spec.linears(index);
            let mut adapted =
                |parts: &[&(String, usize, usize, bool)]| adapt(&mut layout, parts, config);
            AdaptedLayer {
                qkv: adapted(&[&q, &k, &v]),
                o: adapted(&[&o]),
                gate_up: adapted(&[&gate, &up]),
                down: adapted(&[&down]),
            }
        })
        .collect();
    (layout, layers)
}

fn adapt(
    layout: &mut Layout,
    parts: &[&(String, usize, usize, bool)],
    config: &LoraConfig,
) -> Option<Adapted> {
    let (r, rank) = (config.r, stored_rank(config.r));
    let (mut first, mut chosen) = (0, Vec::new());
    for (module, outputs, inputs, _) in parts {
        if config.targets_module(module) {
            chosen.push((module.clone(), first..first + outputs, *inputs));
        }
        first += outputs;
    }
    let inputs = chosen.first()?.2;
    let a = layout.slot(chosen.len() * rank * inputs, true);
    let parts = chosen
        .into_iter()
        .enumerate()
        .map(|(i, (module, rows, _))| {
            layout.params.push(Param {
                name: format!("{module}.lora_A.weight"),
                slot: a,
                start: i * rank * inputs,
                rows: r,
                columns: inputs,
                stride: inputs,
                vector: false,
            });
            let b = layout.slot(rows.len() * rank, true);
            layout.params.push(Param {
                name: format!("{module}.lora_B.weight"),
                slot: b,
                start: 0,
                rows: rows.len(),
                columns: r,
                stride: rank,
                vector: false,
            });
            AdaptedPart { module, b, rows }
        });
    Some(Adapted {
        a,
        parts: parts.collect(),
        inputs,
        outputs: first,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{spec::Family, weights::ALL_LINEAR};

    fn spec(family: Family, tied: bool) -> ModelSpec {
        ModelSpec {
            family,
            vocab_size: 50,
            hidden_size: 32,
            intermediate_size: 64,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 32,
            max_position_embeddings: 64,
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            rope_scaling: None,
            tie_word_embeddings: tied,
            qkv_bias: family == Family::Qwen2,
            o_bias: false,
            qk_norm: family == Family::Qwen3,
        }
    }

    #[test]
    fn every_weight_of_the_checkpoint_has_its_window_and_nobody_elses() {
        for (family, tied) in [
            (Family::Qwen2, true),
            (Family::Qwen3, false),
            (Family::Llama, false),
        ] {
            let spec = spec(family, tied);
            let (layout, slots) = of_model(&spec);
            let mut expected = spec.weight_shapes();
            let mut found: Vec<(String, Vec<usize>)> = (layout.params.iter())
                .map(|p| (p.name.clone(), p.shape()))
                .collect();
            expected.sort();
            found.sort();
            assert_eq!(found, expected);
            assert_eq!(layout.count(), spec.parameters());
            let mut owner: Vec<Vec<bool>> =
                layout.slots.iter().map(|s| vec![false; s.len]).collect();
            for param in &layout.params {
                for taken in &mut owner[param.slot][param.window()] {
                    assert!(!std::mem::replace(taken, true), "{}", param.name);
                }
            }
            assert!(owner.iter().flatten().all(|taken| *taken));
            assert!(layout.slots.iter().all(|s| s.offset % STEP == 0));
            assert!(
                layout
                    .slots
                    .windows(2)
                    .all(|w| w[0].offset + w[0].len <= w[1].offset)
            );
            assert_eq!(slots.head == slots.embed, tied);
        }
    }

    #[test]
    fn fused_matrices_are_split_as_they_were_joined() {
        let (layout, slots) = of_model(&spec(Family::Qwen2, true));
        let slot = layout.slots[slots.layers[1].qkv];
        let mut fused = vec![0usize; slot.len];
        for (part, first) in [("q", 1000), ("k", 20_000), ("v", 30_000)] {
            let name = format!("model.layers.1.self_attn.{part}_proj.weight");
            let param = layout.find(&name).unwrap();
            let values: Vec<usize> = (first..first + param.count()).collect();
            param.join(&values, &mut fused[param.window()]);
            assert_eq!(param.split(&fused[param.window()]), values);
        }
        // q has 128 rows of 32, k and v 64 each.
        assert_eq!([fused[0], fused[4095], fused[4096]], [1000, 5095, 20_000]);
        assert_eq!(
            [fused[6143], fused[6144], fused[8191]],
            [22_047, 30_000, 32_047]
        );
    }

    #[test]
    fn adapters_are_stored_in_whole_words_and_come_out_with_their_rank() {
        let config = LoraConfig {
            r: 3,
            alpha: 6.0,
            targets: vec![
                "q_proj".to_owned(),
                "v_proj".to_owned(),
                "down_proj".to_owned(),
            ],
        };
        let (layout, layers) = of_adapters(&spec(Family::Llama, true), &config);
        let qkv = layers[0].qkv.as_ref().unwrap();
        assert_eq!((qkv.inputs, qkv.outputs), (32, 256));
        let rows: Vec<_> = qkv.parts.iter().map(|part| part.rows.clone()).collect();
        assert_eq!(rows, [0..128, 192..256]);
        assert_eq!(layout.slots[qkv.a].len, 2 * 8 * 32);
        assert!(layers[0].o.is_none() && layers[0].gate_up.is_none());
        let b = layout
            .find("model.layers.1.self_attn.v_proj.lora_B.weight")
            .unwrap();
        assert_eq!(b.shape(), [64, 3]);
        let values: Vec<f32> = (0..192).map(|i| i as f32 + 1.0).collect();
        let mut window = vec![0.0; b.window().len()];
        b.join(&values, &mut window);
        assert_eq!(window[..9], [1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0]);
        assert_eq!(b.split(&window), values);
        let all = LoraConfig {
            targets: vec![ALL_LINEAR.to_owned()],
            ..config
        };
        let (layout, layers) = of_adapters(&spec(Family::Llama, true), &all);
        assert_eq!(layers[1].gate_up.as_ref().unwrap().parts.len(), 2);
        // Of each layer 3 · (inputs + outputs) of the seven.
        let each = 3 * (32 + 128 + 2 * (32 + 64) + 128 + 32 + 2 * (32 + 64) + 64 + 32);
        assert_eq!(layout.count(), 2 * each);
    }
}
