//! The engine with every kind of draft: greedy completions are those without, sampled ones distributed as without.

use grpo_policy::{
    backend::{
        Backend, Exit, StepRow,
        cuda::{BLOCK_SIZE, CudaBackend},
    },
    engine::{
        Engine, EngineConfig,
        draft::{Draft, Length, Model, Source, Suffix},
    },
    spec::{Family, ModelSpec},
    types::{Completion, Request, SamplingParams},
};

use crate::{
    args, backend,
    cuda_models::{SIZES, cache, spec, weights},
};

fn engine(max_batch: usize) -> Engine {
    Engine::new(EngineConfig {
        block_size: BLOCK_SIZE,
        kv_blocks: 1024,
        max_batch,
        max_step_tokens: 1024,
        enable_prefix_cache: true,
        max_model_len: 512,
    })
    .unwrap()
}

fn generate(
    gpu: &mut CudaBackend,
    draft: Option<&mut Draft<CudaBackend>>,
    requests: Vec<Request>,
) -> Vec<Completion> {
    let tokenizer = grpo_host::defaults::model().unwrap().tokenizer;
    engine(48)
        .generate(gpu, draft, &tokenizer, requests, &mut |_| {})
        .unwrap()
}

fn requests(vocab: usize, prompts: u64, n: u32, sampling: &SamplingParams) -> Vec<Request> {
    let prompt =
        |id: u64| (0..20 + 13 * id).map(move |i| ((i * 31 + id * 7) % vocab as u64 % 300) as u32);
    (0..prompts)
        .map(|id| Request {
            id,
            prompt: prompt(id).collect(),
            n,
            sampling: sampling.clone(),
            seed: 100 + id,
        })
        .collect()
}

/// Every kind of draft for a policy of this shape.
fn sources(spec: &ModelSpec) -> Vec<(&'static str, Source<CudaBackend>)> {
    let model = |seed| {
        let gpu = CudaBackend::new(0, spec.clone(), &weights(spec, seed), SIZES, cache()).unwrap();
        Source::Model(Box::new(Model::new(gpu, spec).unwrap()))
    };
    vec![
        ("ngram", Source::Ngram),
        ("suffix", Source::Suffix(Suffix::default())),
        ("model: itself", model(21)),
        ("model: a stranger", model(22)),
        ("layers", Source::EarlyExit),
    ]
}

/// Greedy with each draft is plain greedy; where one differs from the other, the two tokens are as good as equal.
#[test]
#[ignore = "needs a GPU"]
fn greedy_with_drafts_is_plain_greedy() {
    let spec = spec(Family::Qwen2, (14, 2, 64), 1009);
    let tensors = weights(&spec, 21);
    let mut gpu = CudaBackend::new(0, spec.clone(), &tensors, SIZES, cache()).unwrap();
    gpu.add_early_exit(2, None).unwrap();
    // Else near-ties fall one way in a step of one token and the other way in a step of five.
    gpu.set_deterministic().unwrap();
    let greedy = SamplingParams {
        temperature: 0.0,
        max_tokens: 60,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let work = requests(spec.vocab_size, 12, 2, &greedy);
    let plain = generate(&mut gpu, None, work.clone());
    for (name, source) in sources(&spec) {
        let mut draft = Draft::new(source, Length::Fixed(4)).unwrap();
        let found = generate(&mut gpu, Some(&mut draft), work.clone());
        assert!(draft.fault().is_none());
        let pairs = plain.iter().zip(&found);
        let differ = pairs.filter(|(p, f)| p.tokens != f.tokens).count();
        let sum = |of: fn(&Completion) -> u32| found.iter().map(of).sum::<u32>();
        let (drafted, accepted) = (
            sum(|c| c.telemetry.draft_tokens),
            sum(|c| c.telemetry.accepted_tokens),
        );
        println!(
            "{name}: {differ} of {} differ; {accepted} of {drafted} accepted",
            plain.len()
        );
        assert_eq!(differ, 0, "{name}");
        assert!(drafted > 0);
    }
}

/// A statistic X² of `freedom` degrees as a standard normal number (Wilson & Hilferty 1931).
fn normal(statistic: f64, freedom: f64) -> f64 {
    let share = 2.0 / (9.0 * freedom);
    ((statistic / freedom).cbrt() - (1.0 - share)) / share.sqrt()
}

/// What is drawn with a draft is distributed as without, and a draft that is trusted too much would be noticed.
#[test]
#[ignore = "needs a GPU"]
fn sampling_with_drafts_keeps_the_distribution() {
    let spec = spec(Family::Qwen2, (4, 2, 32), 17);
    let tensors = weights(&spec, 21);
    let mut gpu = CudaBackend::new(0, spec.clone(), &tensors, SIZES, cache()).unwrap();
    gpu.add_early_exit(2, None).unwrap();
    let mut plain = backend(&spec, &tensors);
    let sampling = SamplingParams {
        temperature: 1.2,
        top_p: 0.97,
        max_tokens: 3,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    const N: u32 = 4000;
    let work = requests(spec.vocab_size, 1, N, &sampling);
    let exact = |gpu: &mut CudaBackend, params: &SamplingParams| -> Vec<f64> {
        let mut second = vec![0.0; spec.vocab_size];
        let mut of = |text: &[u32]| -> Vec<f32> {
            let row = StepRow {
                sequence: 0,
                tokens: text,
                position: 0,
                blocks: &[0, 1],
                sample: Some(args(params, 0, 0, None, 0)),
            };
            let drafted = gpu.propose(&[row], Exit::Final).unwrap().remove(0);
            drafted.distribution.dense().unwrap().into_owned()
        };
        for (token, p) in of(&work[0].prompt)
            .iter()
            .enumerate()
            .filter(|(_, p)| **p > 0.0)
        {
            let text = [&work[0].prompt[..], &[token as u32]].concat();
            let then = of(&text);
            second
                .iter_mut()
                .zip(&then)
                .for_each(|(s, q)| *s += f64::from(*p) * f64::from(*q));
        }
        second
    };
    let wrong = SamplingParams {
        temperature: 1.5,
        ..sampling.clone()
    };
    let (right, wrong) = (exact(&mut plain, &sampling), exact(&mut plain, &wrong));
    for (name, source) in sources(&spec) {
        let mut draft = Draft::new(source, Length::Fixed(2)).unwrap();
        let found = generate(&mut gpu, Some(&mut draft), work.clone());
        let mut counts = vec![0.0; spec.vocab_size];
        found
            .iter()
            .for_each(|c| counts[c.tokens[1] as usize] += 1.0);
        let score = |exact: &[f64]| {
            let cells = exact
                .iter()
                .zip(&counts)
                .filter(|(p, _)| **p * f64::from(N) >= 5.0);
            let of = |(p, n): (&f64, &f64)| (n - p * f64::from(N)).powi(2) / (p * f64::from(N));
            let freedom = cells.clone().count() as f64 - 1.0;
            normal(cells.map(of).sum(), freedom)
        };
        let accepted: u32 = found.iter().map(|c| c.telemetry.accepted_tokens).sum();
        println!(
            "{name}: z {:.2}, at a wrong temperature {:.2}; {accepted} accepted",
            score(&right),
            score(&wrong)
        );
        assert!(score(&right) < 3.5 && score(&wrong) > 3.5, "{name}");
    }
}
