//! Weights that stay quantised on a GPU beside the same ones made bf16, and the speed of both. Needs a GPU, so CI leaves it
//! out; run it with `cargo test --release --test cuda_quantized -- --ignored --nocapture --test-threads 1`.

mod cuda_models;

use std::{collections::BTreeMap, time::Instant};

use candle_core::{DType, Device, Tensor, quantized::GgmlDType};
use cuda_models::{SIZES, cache, spec, weights};
use grpo_policy::{
    backend::{
        Backend, Drafted, Exit, SampleArgs, StepRow,
        cpu::{CpuBackend, Trainable},
        cuda::{BLOCK_SIZE, CudaBackend, CudaSizes, CudaWeights},
    },
    engine::sampler::Proposal,
    spec::{Family, ModelSpec},
    types::SamplingParams,
    weights::{Quantized, QuantizedMatrix},
};

/// A model with its matrices in blocks: the head's format first, then those of the layers in turn.
struct Model {
    spec: ModelSpec,
    tensors: BTreeMap<String, Tensor>,
    quantized: Quantized,
}

impl Model {
    fn new(spec: ModelSpec, head: Option<GgmlDType>, formats: &[GgmlDType]) -> Self {
        let (mut tensors, mut quantized) = (BTreeMap::new(), Quantized::new());
        for (i, (name, tensor)) in weights(&spec, 7).into_iter().enumerate() {
            let is_head = name.contains("embed") || name.contains("lm_head");
            let format = match is_head {
                true => head,
                false => Some(formats[i % formats.len()]),
            };
            match format {
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

    /// In f32, the numbers as bf16 has them.
    fn dense(&self) -> BTreeMap<String, Tensor> {
        let mut all = self.tensors.clone();
        for (name, matrix) in &self.quantized {
            let rounded = matrix.dequantize().unwrap().to_dtype(DType::BF16).unwrap();
            all.insert(name.clone(), rounded.to_dtype(DType::F32).unwrap());
        }
        all
    }

    fn on_gpu(&self, keep: bool, sizes: CudaSizes) -> CudaBackend {
        let weights = CudaWeights {
            tensors: &self.tensors,
            quantized: &self.quantized,
            keep,
        };
        CudaBackend::with_weights(0, self.spec.clone(), weights, sizes, cache()).unwrap()
    }
}

/// Of each of `rows` texts of `tokens` tokens the `[V]` log-probs behind it, less their mean.
fn logits(backend: &mut impl Backend, exit: Exit, (rows, tokens): (usize, usize)) -> Vec<f64> {
    let (vocab, width) = (backend.spec().vocab_size, tokens.div_ceil(BLOCK_SIZE));
    let text = |row: usize| (0..tokens).map(move |i| ((i + 31 * row) * 7919 % vocab) as u32);
    let texts: Vec<Vec<u32>> = (0..rows).map(|row| text(row).collect()).collect();
    let blocks: Vec<u32> = (0..(rows * width) as u32).collect();
    let params = SamplingParams::default();
    let of_row = |row: usize| StepRow {
        sequence: row as u64,
        tokens: &texts[row],
        position: 0,
        blocks: &blocks[row * width..][..width],
        sample: Some(sample(&params, row, 0, None)),
    };
    let step: Vec<StepRow<'_>> = (0..rows).map(of_row).collect();
    let drafted = backend.propose(&step, exit).unwrap();
    let centred = |drafted: &Drafted| {
        let logs: Vec<f64> = log_probs(drafted);
        let mean = logs.iter().sum::<f64>() / logs.len() as f64;
        logs.into_iter().map(move |x| x - mean)
    };
    drafted.iter().flat_map(centred).collect()
}

fn log_probs(drafted: &Drafted) -> Vec<f64> {
    let dense = drafted.distribution.dense().unwrap();
    dense
        .iter()
        .map(|p| f64::from(*p).max(1e-30).ln())
        .collect()
}

fn sample<'a>(
    params: &'a SamplingParams,
    row: usize,
    position: usize,
    proposal: Option<&'a Proposal>,
) -> SampleArgs<'a> {
    SampleArgs {
        params,
        stream: row as u64,
        position: position as u64,
        history: &[],
        proposal,
        top: 0,
        ahead: 0,
    }
}

/// Relative.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    let apart: f64 = a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum();
    (apart / a.iter().map(|x| x.powi(2)).sum::<f64>()).sqrt()
}

/// All formats, alone and mixed in one matrix, with the head in blocks and not, on all products: those for few tokens, for
/// some, and the library's.
#[test]
#[ignore = "needs a GPU"]
fn quantised_weights_are_the_same_as_bf16_ones() {
    use GgmlDType::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
    let cases: [(Option<GgmlDType>, &[GgmlDType]); 7] = [
        (None, &[Q4_0]),
        (Some(Q8_0), &[Q4_0]),
        (Some(Q4_1), &[Q4_1]),
        (Some(Q5_1), &[Q5_0]),
        (Some(Q4_0), &[Q5_1]),
        (None, &[Q8_0]),
        (Some(Q8_0), &[Q4_0, Q8_0, Q5_1, Q4_1, Q5_0]),
    ];
    let shapes = [
        spec(Family::Qwen2, (14, 2, 64), 1008),
        spec(Family::Qwen3, (8, 1, 128), 1024),
        spec(Family::Llama, (9, 3, 64), 515),
    ];
    println!(
        "head    layers           kept of bf16   rows·tokens: from bf16 on the GPU, from f32 on the CPU"
    );
    for (i, (head, formats)) in cases.into_iter().enumerate() {
        let model = Model::new(shapes[i % shapes.len()].clone(), head, formats);
        let (spec, dense) = (model.spec.clone(), model.dense());
        let mut cpu = CpuBackend::new(spec.clone(), &dense, &Trainable::Nothing, false).unwrap();
        let mut kept = model.on_gpu(true, SIZES);
        let mut made = model.on_gpu(false, SIZES);
        assert!(kept.weight_bytes() < made.weight_bytes());
        assert!(kept.step_bytes(0) < made.step_bytes(0));
        cpu.init_kv(64, BLOCK_SIZE).unwrap();
        kept.init_kv(64, BLOCK_SIZE).unwrap();
        made.init_kv(64, BLOCK_SIZE).unwrap();
        print!(
            "{head:5?} {formats:?} {} of {}",
            kept.weight_bytes(),
            made.weight_bytes()
        );
        for shape in [
            (1, 1),
            (1, 5),
            (1, 8),
            (1, 9),
            (1, 27),
            (1, 40),
            (1, 65),
            (1, 200),
            (3, 1),
            (8, 1),
            (11, 1),
            (30, 1),
            (50, 1),
        ] {
            let of = |backend: &mut CudaBackend| logits(backend, Exit::Final, shape);
            let (kept, made) = (of(&mut kept), of(&mut made));
            let cpu = logits(&mut cpu, Exit::Final, shape);
            let (near, far) = (distance(&made, &kept), distance(&cpu, &kept));
            let (rows, tokens) = shape;
            print!("  {rows}·{tokens}: {near:.4}, {far:.4}");
            assert!(near < 0.02 && far < 0.03, "{shape:?}: {near}, {far}");
            // The same products on the same numbers, but for the head, which comes in parts or by another product; in bf16,
            // of one row, cublasLt's algorithm may be another.
            let same = (33..=64).contains(&(rows * tokens)) && head.is_none();
            assert!(!same || near < 1e-5, "{shape:?}: {near}");
        }
        println!();
    }
}

/// In the deterministic mode everything is a product of bf16 weights, the head's too.
#[test]
#[ignore = "needs a GPU"]
fn deterministic_logits_do_not_know_that_weights_are_quantised() {
    let shape = spec(Family::Qwen2, (14, 2, 64), 1008);
    let model = Model::new(shape, Some(GgmlDType::Q8_0), &[GgmlDType::Q4_1]);
    let mut all = [true, false].map(|keep| model.on_gpu(keep, SIZES));
    for shape in [(1, 1), (1, 8), (1, 33), (1, 150), (9, 1)] {
        let [kept, made] = all.each_mut().map(|backend| {
            backend.set_deterministic().unwrap();
            backend.init_kv(16, BLOCK_SIZE).unwrap();
            logits(backend, Exit::Final, shape)
        });
        assert!(kept == made, "{shape:?}: {}", distance(&kept, &made));
    }
}

/// The head behind the first layers, by itself and beside the policy.
#[test]
#[ignore = "needs a GPU"]
fn an_early_exit_reads_a_quantised_head() {
    let shape = spec(Family::Qwen2, (14, 2, 64), 1008);
    let model = Model::new(shape, Some(GgmlDType::Q8_0), &[GgmlDType::Q4_0]);
    let hidden = model.spec.hidden_size;
    let adapter = Tensor::randn(0f32, 0.1, (hidden, hidden), &Device::Cpu).unwrap();
    let norm = Tensor::rand(0.5f32, 1.5, hidden, &Device::Cpu).unwrap();
    let trained = BTreeMap::from([
        ("draft_head.norm.weight".to_owned(), norm),
        ("draft_head.adapter.weight".to_owned(), adapter),
    ]);
    let mut untrained = Vec::new();
    for head in [None, Some(&trained)] {
        let [mut kept, mut made] = [true, false].map(|keep| {
            let mut backend = model.on_gpu(keep, SIZES);
            backend.add_early_exit(1, head).unwrap();
            backend.init_kv(64, BLOCK_SIZE).unwrap();
            backend
        });
        for shape in [(1, 1), (8, 1), (30, 1), (50, 1), (1, 40), (1, 200)] {
            let early = logits(&mut kept, Exit::Early, shape);
            let near = distance(&logits(&mut made, Exit::Early, shape), &early);
            let apart = distance(&logits(&mut kept, Exit::Final, shape), &early);
            println!("{shape:?}: {near:.4} from bf16, {apart:.2} from the last layer");
            assert!(near < 0.02 && apart > 0.05, "{shape:?}: {near}, {apart}");
            match head {
                None => untrained.push(early),
                Some(_) => assert!(distance(&untrained.remove(0), &early) > 0.05, "{shape:?}"),
            }
        }
    }
}

/// A verification of several tokens a sequence says of each of them what a step of one token said before.
#[test]
#[ignore = "needs a GPU"]
fn verification_agrees_with_single_steps() {
    const PROPOSED: usize = 3;
    let shape = spec(Family::Qwen3, (8, 1, 128), 1024);
    let model = Model::new(shape, Some(GgmlDType::Q8_0), &[GgmlDType::Q4_0]);
    let mut gpu = model.on_gpu(true, SIZES);
    gpu.init_kv(64, BLOCK_SIZE).unwrap();
    let params = SamplingParams::default();
    // 8, 20, 60 and 160 tokens: the products for few of them, those of the GPU and the library's.
    for rows in [2, 5, 15, 40] {
        let blocks: Vec<u32> = (0..rows as u32).collect();
        let mut texts: Vec<Vec<u32>> = (0..rows as u32).map(|row| vec![17 + row]).collect();
        let (mut proposals, mut logs) = (vec![Proposal::default(); rows], vec![Vec::new(); rows]);
        for position in 0..PROPOSED {
            let of_row = |row: usize| StepRow {
                sequence: row as u64,
                tokens: &texts[row][position..],
                position,
                blocks: &blocks[row..=row],
                sample: Some(sample(&params, row, position + 1, None)),
            };
            let step: Vec<StepRow<'_>> = (0..rows).map(of_row).collect();
            for (row, drafted) in gpu
                .propose(&step, Exit::Final)
                .unwrap()
                .into_iter()
                .enumerate()
            {
                logs[row].push(log_probs(&drafted));
                texts[row].push(drafted.token);
                proposals[row].tokens.push(drafted.token);
                proposals[row].probabilities.push(drafted.distribution);
            }
        }
        let of_row = |row: usize| StepRow {
            sequence: row as u64,
            tokens: &texts[row],
            position: 0,
            blocks: &blocks[row..=row],
            sample: Some(sample(&params, row, 1, Some(&proposals[row]))),
        };
        let step: Vec<StepRow<'_>> = (0..rows).map(of_row).collect();
        let (mut accepted, mut farthest) = (0, 0f64);
        for (row, sampled) in gpu.step(&step).unwrap().iter().enumerate() {
            accepted += sampled.len() - 1;
            for (of, logs) in sampled.iter().zip(&logs[row]) {
                let apart = f64::from(of.policy_logprob) - logs[of.token as usize];
                farthest = farthest.max(apart.abs());
            }
        }
        let proposed = PROPOSED * rows;
        println!("{rows} rows: {accepted} of {proposed} accepted, log-probs {farthest:.4} apart");
        assert!(farthest < 0.1, "{rows} rows: {farthest}");
        assert!(10 * accepted >= 8 * proposed, "{rows} rows: {accepted}");
    }
}

/// Random blocks with weights of about the size that trained models have; vectors as of a model before its training.
fn random_model(config: &str, format: GgmlDType, head: GgmlDType) -> Model {
    let spec = ModelSpec::from_config_json(config.as_bytes(), "config.json".as_ref()).unwrap();
    let (mut tensors, mut quantized) = (BTreeMap::new(), Quantized::new());
    for (name, shape) in spec.weight_shapes() {
        let [rows, columns] = shape[..] else {
            let value = f32::from(u8::from(name.contains("norm")));
            let vector = Tensor::full(value, shape, &Device::Cpu).unwrap();
            tensors.insert(name, vector);
            continue;
        };
        let format = match name.contains("embed") || name.contains("lm_head") {
            true => head,
            false => format,
        };
        let size = format.type_size();
        let mut state = 0x9e37_79b9_u32 ^ rows as u32;
        let mut bytes = vec![0u8; rows * columns / format.block_size() * size];
        for byte in &mut bytes {
            state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            *byte = (state >> 24) as u8;
        }
        // 0.0031 and 0.0002 as f16.
        let d: [u8; 2] = match format {
            GgmlDType::Q8_0 => [0x8d, 0x0a],
            _ => [0x59, 0x1a],
        };
        for block in bytes.chunks_exact_mut(size) {
            block[..2].copy_from_slice(&d);
        }
        let matrix = QuantizedMatrix::from_bytes(format, (rows, columns), &bytes).unwrap();
        quantized.insert(name, matrix);
    }
    Model {
        spec,
        tensors,
        quantized,
    }
}

/// Tokens per second of `batch` sequences behind prompts of one token, bursts and all.
fn tokens_per_second(backend: &mut CudaBackend, batch: usize) -> f64 {
    const STEPS: usize = 16;
    let params = SamplingParams::default();
    let blocks: Vec<Vec<u32>> = (0..batch as u32)
        .map(|s| (0..8).map(|b| s * 8 + b).collect())
        .collect();
    let mut burst = |position: usize| {
        let rows: Vec<StepRow<'_>> = blocks
            .iter()
            .enumerate()
            .map(|(s, blocks)| StepRow {
                sequence: s as u64,
                tokens: &[17],
                position,
                blocks,
                sample: Some(SampleArgs {
                    // One to read, and one that runs meanwhile.
                    ahead: 2 * STEPS - 1,
                    ..sample(&params, s, position, None)
                }),
            })
            .collect();
        let drawn = backend.step(&rows).unwrap();
        assert_eq!(drawn.iter().map(Vec::len).sum::<usize>(), batch * STEPS);
    };
    burst(0);
    burst(STEPS);
    let start = Instant::now();
    let rounds = 8;
    for round in 0..rounds {
        burst(2 * STEPS + round * STEPS);
    }
    (rounds * STEPS * batch) as f64 / start.elapsed().as_secs_f64()
}

/// What keeping weights costs and brings.
#[test]
#[ignore = "needs a GPU"]
fn speed_of_quantised_weights() {
    let sizes = CudaSizes {
        max_step_tokens: 256,
        max_batch: 64,
        max_model_len: 512,
    };
    let shapes = [
        (
            "135M",
            include_str!("../../host/src/commands/shapes/smollm2-135m.json"),
        ),
        (
            "0.5B",
            include_str!("../../host/src/commands/shapes/qwen2.5-0.5b.json"),
        ),
        (
            "1.5B",
            include_str!("../../host/src/commands/shapes/qwen2.5-1.5b.json"),
        ),
    ];
    println!("shape  weights  MiB    load s   tokens/s at 1, 4, 8, 16, 32, 64 sequences");
    for (name, config) in shapes {
        let model = random_model(config, GgmlDType::Q4_0, GgmlDType::Q8_0);
        for keep in [true, false] {
            let start = Instant::now();
            let mut gpu = model.on_gpu(keep, sizes);
            let loaded = start.elapsed().as_secs_f64();
            gpu.init_kv(64 * 8, BLOCK_SIZE).unwrap();
            let what = if keep { "kept" } else { "bf16" };
            print!(
                "{name}   {what:5} {:7}  {loaded:6.2}",
                gpu.weight_bytes() >> 20
            );
            for batch in [1, 4, 8, 16, 32, 64] {
                print!("  {:8.0}", tokens_per_second(&mut gpu, batch));
            }
            println!();
        }
    }
}
