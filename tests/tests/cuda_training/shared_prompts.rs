//! Groups whose prompt is encoded once: gradients beside those of the CPU, and of the same sequences each with its prompt.

use super::*;

/// Prompts around the tiles of attention, one of them of one token.
const GROUPS: [(usize, &[usize]); 4] = [
    (200, &[40, 1, 130, 7]),
    (1, &[5, 128]),
    (128, &[60, 60, 3]),
    (129, &[129]),
];

/// The same scored tokens, in the same order, with shared prompts and without.
fn batches(vocab: usize) -> [PackedBatch; 2] {
    let (mut shared, mut whole) = (PackedBatch::default(), PackedBatch::default());
    let ids = |n: usize, salt: usize| -> Vec<u32> {
        let id = |i: usize| ((i * i * 31 + i * 7 + salt * 131) % vocab) as u32;
        (0..n).map(id).collect()
    };
    for (g, (prompt, completions)) in GROUPS.into_iter().enumerate() {
        let prompt = ids(prompt, g);
        let numbered = completions.iter().enumerate();
        let completions: Vec<_> = numbered.map(|(i, n)| ids(*n, 10 * g + i + 5)).collect();
        shared.push_group(&prompt, completions.iter().map(|c| &c[..]));
        for completion in &completions {
            whole.push(&[&prompt[..], completion].concat(), prompt.len());
        }
    }
    [shared, whole]
}

#[test]
#[ignore = "needs a GPU"]
fn gradients_of_shared_prompts_are_those_of_whole_sequences() {
    for (spec, kept) in [
        (spec(Family::Qwen2, (14, 2, 64), 1009), Kept::ACTIVATIONS),
        (spec(Family::Qwen3, (8, 1, 128), 1024), Kept::INPUTS),
        (spec(Family::Llama, (6, 3, 32), 515), Kept::ACTIVATIONS),
        (spec(Family::Llama, (16, 1, 96), 263), Kept::ACTIVATIONS),
    ] {
        let tensors = fresh(&spec, 7);
        for trainable in [FULL, lora(&["all-linear"], 16)] {
            let [shared, whole] = batches(spec.vocab_size);
            let dlogp = coefficients(shared.n_scored());
            let run = |backend: &mut dyn Backend, batch: &PackedBatch| {
                let scores = backend.score(batch, 0.9, Pass::Train).unwrap();
                backend.backward(&dlogp).unwrap();
                scores
            };
            let mut cpu = cpu(&spec, &tensors, &trainable);
            let (mut once, mut each) = (
                gpu(&spec, &tensors, &trainable, kept),
                gpu(&spec, &tensors, &trainable, kept),
            );
            let expected = run(&mut cpu, &shared);
            let found = run(&mut once, &shared);
            let separate = run(&mut each, &whole);
            let logp = (spread(&expected, &found), spread(&separate, &found));
            let gradients = cpu.export_gradients().unwrap();
            let found = once.export_gradients().unwrap();
            let (all, worst, name) = apart(&gradients, &found);
            let (between, ..) = apart(&each.export_gradients().unwrap(), &found);
            println!(
                "{:?} heads of {}: logp {:.4} and {:.4}, gradients apart {all:.4}, worst {worst:.4} {name}, from whole ones {between:.4}",
                spec.family, spec.head_dim, logp.0, logp.1
            );
            assert!(logp.0 < 0.05 && logp.1 < 0.05);
            assert!(all < 0.01 && worst < 0.1 && between < 0.01);
        }
    }
}
