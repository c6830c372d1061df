//! Adapters beside the weights instead of in them, over bf16 weights and over quantised ones (QLoRA), beside the CPU, whose base
//! is the same in f32.

use candle_core::quantized::GgmlDType::{self, Q4_0, Q4_1, Q5_1, Q8_0};
use grpo_policy::{
    backend::cuda::CudaError,
    weights::{Quantized, QuantizedMatrix},
};

use super::{rollouts::check_same_policy, *};

/// A model whose matrices may be in blocks.
struct Base {
    spec: ModelSpec,
    tensors: Tensors,
    quantized: Quantized,
}

fn learns(trainable: &Trainable, merge: Option<bool>) -> Learns<'_> {
    Learns {
        merge,
        ..Learns::of(trainable)
    }
}

impl Base {
    /// The format of the head, then those of the layers in turn; nothing for bf16.
    fn new(spec: ModelSpec, head: Option<GgmlDType>, formats: &[GgmlDType]) -> Self {
        let (mut tensors, mut quantized) = (Tensors::new(), Quantized::new());
        for (i, (name, tensor)) in fresh(&spec, 7).into_iter().enumerate() {
            let is_head = name.contains("embed") || name.contains("lm_head");
            let of_layer = formats.get(i % formats.len().max(1)).copied();
            match if is_head { head } else { of_layer } {
                Some(format) if tensor.dims().len() == 2 => {
                    let matrix = QuantizedMatrix::quantize(&tensor, format).unwrap();
                    quantized.insert(name, matrix);
                }
                _ => _ = tensors.insert(name, tensor),
            }
        }
        Self {
            spec,
            tensors,
            quantized,
        }
    }

    fn given(&self) -> CudaWeights<'_> {
        CudaWeights {
            tensors: &self.tensors,
            quantized: &self.quantized,
            keep: true,
        }
    }

    /// All of it in f32.
    fn dense(&self) -> Tensors {
        let blocks = self.quantized.iter();
        let made = blocks.map(|(name, m)| (name.clone(), m.dequantize().unwrap()));
        self.tensors.clone().into_iter().chain(made).collect()
    }

    fn gpu(&self, trainable: &Trainable, kept: Kept) -> CudaBackend {
        let (spec, given) = (self.spec.clone(), self.given());
        let mut gpu = CudaBackend::with_weights(0, spec, given, SIZES, cache()).unwrap();
        let unmerged = learns(trainable, Some(false));
        gpu.train(given, unmerged, (1024, kept)).unwrap();
        gpu
    }
}

fn bases() -> Vec<Base> {
    vec![
        Base::new(spec(Family::Qwen2, (6, 3, 64), 521), None, &[]),
        Base::new(spec(Family::Qwen2, (14, 2, 64), 1008), None, &[Q4_0]),
        Base::new(spec(Family::Qwen3, (6, 3, 32), 777), Some(Q8_0), &[Q8_0]),
        Base::new(
            spec(Family::Llama, (6, 2, 64), 521),
            Some(Q4_1),
            &[Q4_0, Q8_0, Q5_1],
        ),
    ]
}

/// `B` is 0 at first, which leaves `A` without a gradient.
fn moved(adapter: &Tensors) -> Tensors {
    let moved = |(name, tensor): (&String, &Tensor)| {
        let n = tensor.elem_count();
        let wave: Vec<f32> = (0..n)
            .map(|i| ((i * 29) % 23) as f32 / 400.0 - 0.0275)
            .collect();
        let wave = Tensor::from_vec(wave, tensor.dims(), tensor.device()).unwrap();
        (name.clone(), tensor.add(&wave).unwrap())
    };
    adapter.iter().map(moved).collect()
}

#[test]
#[ignore = "needs a GPU"]
fn log_probs_and_gradients_beside_a_base_are_those_of_the_cpu() {
    let targets: [(&[&str], usize); 3] = [
        (&["all-linear"], 8),
        (&["q_proj", "v_proj", "down_proj"], 5),
        (&["up_proj", "o_proj", "k_proj"], 16),
    ];
    for base in bases() {
        let dense = base.dense();
        for (targets, r) in targets {
            let trainable = lora(targets, r);
            let mut cpu = cpu(&base.spec, &dense, &trainable);
            let mut gpu = base.gpu(&trainable, Kept::ACTIVATIONS);
            let start = cpu.export_adapter().unwrap();
            assert_eq!(bits(&start), bits(&gpu.export_adapter().unwrap()));
            assert_eq!(cpu.parameters(), gpu.parameters());
            let adapter = moved(&start);
            cpu.import(&adapter, Exit::Final).unwrap();
            gpu.import(&adapter).unwrap();
            let batch = batch(base.spec.vocab_size);
            let mut score = |pass| {
                let expected = cpu.score(&batch, 1.0, pass).unwrap();
                (expected, gpu.score(&batch, 1.0, pass).unwrap())
            };
            let (expected, reference) = score(Pass::Reference);
            let off = spread(&expected, &reference);
            let (expected, found) = score(Pass::Train);
            let (with, without) = (spread(&expected, &found), spread(&expected, &reference));
            let dlogp = coefficients(batch.n_scored());
            cpu.backward(&dlogp).unwrap();
            gpu.backward(&dlogp).unwrap();
            let gradients = (
                cpu.export_gradients().unwrap(),
                gpu.export_gradients().unwrap(),
            );
            let (all, worst, name) = apart(&gradients.0, &gradients.1);
            println!(
                "{:?}, {} matrices in blocks, {targets:?} r {r}: logp {with:.4}, reference {off:.4}, adapters {without:.4}; gradients apart {all:.4}, worst {worst:.4} {name}",
                base.spec.family,
                base.quantized.len()
            );
            assert!(with < 0.03 && off < 0.03 && without > 4.0 * with);
            assert!(all < 0.01 && worst < 0.1);
            // The base comes out as it went in.
            assert_eq!(bits(&dense), bits(&gpu.export_weights().unwrap()));
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn steps_beside_a_base_follow_the_cpu_resume_exactly_and_roll_out_what_they_train() {
    for base in bases() {
        let trainable = lora(&["all-linear"], 12);
        let batch = batch(base.spec.vocab_size);
        let dense = base.dense();
        let expected = losses(&mut cpu(&base.spec, &dense, &trainable), &batch, 8);
        let mut first = base.gpu(&trainable, Kept::ACTIVATIONS);
        let before = first.score(&batch, 1.0, Pass::Reference).unwrap();
        let found = losses(&mut first, &batch, 4);
        let (weights, optimizer) = (
            first.export_trainable().unwrap(),
            first.export_optimizer().unwrap(),
        );
        let rest = losses(&mut first, &batch, 4);
        println!("losses {expected:.3?} and {found:.3?} {rest:.3?}");
        for (e, f) in expected.iter().zip(found.iter().chain(&rest)) {
            assert!((e - f).abs() < 0.01 + 0.03 * (expected[0] - e));
        }
        assert!(expected[0] - expected[7] > 0.02);
        // What is made again, and where the adapters come from a checkpoint, is the same to the bit.
        let mut second = base.gpu(&trainable, Kept::INPUTS);
        second.import(&weights).unwrap();
        second.import_optimizer(&optimizer).unwrap();
        assert_eq!(losses(&mut second, &batch, 4), rest);
        let end = |gpu: &CudaBackend| bits(&gpu.export_trainable().unwrap());
        assert!(end(&first) == end(&second));
        let after = first.score(&batch, 1.0, Pass::Reference).unwrap();
        assert_eq!(before, after);
        assert_eq!(bits(&dense), bits(&first.export_weights().unwrap()));
        // Alone and many together.
        check_same_policy(&mut first, 1);
        check_same_policy(&mut first, 8);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn distillation_and_shared_prompts_beside_a_quantised_base() {
    let base = Base::new(spec(Family::Llama, (6, 2, 64), 263), Some(Q8_0), &[Q4_0]);
    let trainable = lora(&["all-linear"], 8);
    let mut cpu = cpu(&base.spec, &base.dense(), &trainable);
    let mut gpu = base.gpu(&trainable, Kept::ACTIVATIONS);
    let adapter = moved(&cpu.export_adapter().unwrap());
    cpu.import(&adapter, Exit::Final).unwrap();
    gpu.import(&adapter).unwrap();
    let mut batch = PackedBatch::default();
    let ids = |n: u32| (0..n).map(|i| i * i * 7 % 263).collect::<Vec<u32>>();
    batch.push_group(&ids(150), [&ids(40)[..], &ids(3), &ids(129)]);
    let targets = likely(&batch, base.spec.vocab_size);
    let weight = 1.0 / batch.n_scored() as f64;
    cpu.add_early_exit(2, None).unwrap();
    gpu.add_early_exit(2, None).unwrap();
    for exit in [Exit::Early, Exit::Final] {
        let expected = cpu.distill(&batch, &targets, 0.8, weight, exit).unwrap();
        let found = gpu.distill(&batch, &targets, 0.8, weight, exit).unwrap();
        println!("{exit:?}: cross-entropy {expected:.4} and {found:.4}");
        assert!((expected - found).abs() < 0.01 * expected);
    }
    let (all, worst, name) = apart(
        &cpu.export_gradients().unwrap(),
        &gpu.export_gradients().unwrap(),
    );
    println!("gradients apart {all:.4}, worst {worst:.4} {name}");
    assert!(all < 0.01 && worst < 0.1);
}

#[test]
#[ignore = "needs a GPU"]
fn what_a_quantised_base_cannot_do_is_refused() {
    let base = Base::new(spec(Family::Qwen2, (6, 2, 64), 264), None, &[Q4_0]);
    let mut gpu =
        CudaBackend::with_weights(0, base.spec.clone(), base.given(), SIZES, cache()).unwrap();
    let lora = lora(&["all-linear"], 8);
    let mut train = |trainable, merge| {
        let done = gpu.train(base.given(), learns(trainable, merge), (512, Kept::INPUTS));
        match done.unwrap_err() {
            PolicyError::Cuda(error) => error,
            other => panic!("{other}"),
        }
    };
    assert!(matches!(train(&FULL, None), CudaError::StaysQuantized));
    let merged = train(&lora, Some(true));
    assert!(matches!(merged, CudaError::MergeQuantized));
    if gpu.set_deterministic().is_ok() {
        let mut train = |merge| gpu.train(base.given(), learns(&lora, merge), (512, Kept::INPUTS));
        let refused = train(None).unwrap_err();
        assert!(matches!(
            refused,
            PolicyError::Cuda(CudaError::UnmergedDeterministic)
        ));
    }
    let mut gpu = base.gpu(&lora, Kept::INPUTS);
    assert!(gpu.set_deterministic().is_err());
}
