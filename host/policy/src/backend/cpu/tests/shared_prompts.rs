//! A group whose prompt is encoded once, against the same sequences each with a prompt of its own.

use super::*;

const PROMPTS: [&[u32]; 2] = [&[3, 7, 1, 22, 9], &[8]];
const COMPLETIONS: [&[&[u32]]; 2] = [&[&[4, 4, 17], &[2], &[11, 0, 5, 4, 20]], &[&[6, 1], &[6]]];

/// Two groups and a sequence of its own, and the order of their scored tokens is the same.
fn batches() -> [PackedBatch; 2] {
    let (mut shared, mut whole) = (PackedBatch::default(), PackedBatch::default());
    for (prompt, completions) in PROMPTS.into_iter().zip(COMPLETIONS) {
        shared.push_group(prompt, completions.iter().copied());
        for completion in completions {
            whole.push(&[prompt, completion].concat(), prompt.len());
        }
        for batch in [&mut shared, &mut whole] {
            batch.push(&[5, 11, 2], 1);
        }
    }
    [shared, whole]
}

/// Distance of two lists over the length of the first.
fn apart(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |of: &mut dyn Iterator<Item = f64>| of.map(|x| x * x).sum::<f64>().sqrt();
    let differences = a.iter().zip(b).map(|(a, b)| f64::from(a - b));
    norm(&mut differences.into_iter()) / norm(&mut a.iter().map(|x| f64::from(*x)))
}

#[test]
fn log_probs_and_gradients_are_those_of_whole_sequences() {
    let lora = Trainable::Lora {
        config: crate::weights::LoraConfig {
            r: 2,
            alpha: 4.0,
            targets: vec!["all-linear".to_owned()],
        },
        seed: 3,
    };
    let full = Trainable::Full {
        keep_reference: false,
    };
    for (family, trainable, checkpointing) in [
        (Family::Qwen2, &full, false),
        (Family::Qwen3, &full, true),
        (Family::Llama, &lora, false),
    ] {
        let spec = tiny_spec(family);
        let weights = random_weights(&spec);
        let found = batches().map(|batch| {
            let mut backend =
                CpuBackend::new(spec.clone(), &weights, trainable, checkpointing).unwrap();
            for id in 0..backend.params.len() {
                let by = |name: &str, i: usize| match name.ends_with("lora_B.weight") {
                    true => (i as f32).sin() * 0.2,
                    false => 0.0,
                };
                backend.params.nudge(id, by);
            }
            let scores = backend.score(&batch, TEMPERATURE, Pass::Train).unwrap();
            backend.backward(&coefficients(&batch)).unwrap();
            (scores, backend.export_gradients().unwrap())
        });
        let [(shared, shared_gradients), (whole, gradients)] = found;
        assert!(apart(&whole.logprobs, &shared.logprobs) < 1e-5);
        assert!(apart(&whole.entropy, &shared.entropy) < 1e-5);
        assert_eq!(shared_gradients.len(), gradients.len());
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (name, expected) in &gradients {
            let distance = apart(&flat(expected), &flat(&shared_gradients[name]));
            // Keys move all scores of a query alike when their bias does, so that its gradient is a rest of rounding.
            assert!(
                distance < 1e-5 || name.ends_with("k_proj.bias"),
                "{name}: {distance}"
            );
        }
    }
}

#[test]
fn a_group_beyond_the_context_and_a_prefix_without_tokens_are_refused() {
    let spec = tiny_spec(Family::Qwen2);
    let nothing = Trainable::Nothing;
    let mut backend =
        CpuBackend::new(spec.clone(), &random_weights(&spec), &nothing, false).unwrap();
    let long = vec![1; spec.max_position_embeddings];
    for (prompt, completion) in [(&long[..], &[1][..]), (&[], &[1, 2])] {
        let mut batch = PackedBatch::default();
        batch.push_group(prompt, [completion]);
        let refused = backend.score(&batch, 1.0, Pass::Score).unwrap_err();
        assert!(matches!(refused, PolicyError::Misuse(_)), "{refused}");
    }
}
