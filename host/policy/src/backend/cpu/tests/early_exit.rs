//! The head of an early exit: its gradients, that it learns, and that the policy does not notice.

use super::*;

fn with_exit(family: Family, trainable: &Trainable) -> CpuBackend {
    let spec = tiny_spec(family);
    let weights = random_weights(&spec);
    let mut backend = CpuBackend::new(spec, &weights, trainable, false).unwrap();
    backend.decoder.head.chunk_rows = 3;
    backend.add_early_exit(1, None).unwrap();
    backend
}

fn full() -> Trainable {
    Trainable::Full {
        keep_reference: false,
    }
}

fn distill(backend: &mut CpuBackend, targets: &[TopTokens], weight: f64) -> f64 {
    backend
        .distill(&batch(), targets, TEMPERATURE, weight, Exit::Early)
        .unwrap()
}

#[test]
fn an_untrained_exit_is_the_policy_s_own_head() {
    let backend = with_exit(Family::Qwen3, &Trainable::Nothing);
    let hidden = backend
        .decoder
        .embed(&backend.params, &[3, 7, 1, 22, 9, 4, 4]);
    let own = backend.decoder.head.logits(&backend.params, &hidden);
    let normed = backend.early_exit().unwrap().forward(&hidden);
    let early = backend.decoder.head.unembed(&backend.params, &normed);
    assert_eq!(early.data(), own.data());
}

#[test]
fn gradients_of_the_exit() {
    for family in [Family::Llama, Family::Qwen3] {
        let mut backend = with_exit(family, &full());
        // Off the start, where nothing has been learnt yet.
        backend
            .early_exit
            .as_mut()
            .unwrap()
            .nudge(|_, i| (i as f32).sin() * 0.2);
        let targets = soft_targets(&batch());
        distill(&mut backend, &targets, 0.3);
        let found = backend.early_exit().unwrap().gradients();
        assert_eq!(found.len(), 2);
        let h = 4e-3f32;
        for (id, found) in found.iter().enumerate() {
            for i in [0, 1, found.len() / 3, found.len() - 1] {
                let mut at = |by: f32| {
                    let exit = backend.early_exit.as_mut().unwrap();
                    exit.nudge(|weight, j| if (weight, j) == (id, i) { by } else { 0.0 });
                    let value = distill(&mut backend, &targets, 0.3);
                    let exit = backend.early_exit.as_mut().unwrap();
                    exit.nudge(|weight, j| if (weight, j) == (id, i) { -by } else { 0.0 });
                    value
                };
                let numeric = (at(h) - at(-h)) / (2.0 * f64::from(h));
                let off = (f64::from(found[i]) - numeric).abs();
                assert!(
                    off < 1e-2 * (0.1 + numeric.abs()),
                    "{family:?} weight {id}[{i}]: {} is not {numeric}",
                    found[i]
                );
            }
        }
    }
}

#[test]
fn distillation_brings_the_exit_to_its_target() {
    let mut backend = with_exit(Family::Qwen2, &Trainable::Nothing);
    let targets = soft_targets(&batch());
    let (least, weight) = (entropy(&targets), 1.0 / targets.len() as f64);
    let mut losses = Vec::new();
    for _ in 0..400 {
        losses.push(distill(&mut backend, &targets, weight));
        backend.optimizer_step(&STEP, Exit::Early).unwrap();
    }
    let (first, last) = (losses[0], losses[399]);
    assert!(
        first > least + 1.0 && last < least + 0.1 && last > least,
        "{first} to {last}, at least {least}"
    );
}

/// Weights, gradients and optimizer state of a policy after three updates.
fn updated(trainable: &Trainable, learns: bool) -> [BTreeMap<String, Vec<f32>>; 3] {
    let mut backend = with_exit(Family::Qwen3, trainable);
    let targets = soft_targets(&batch());
    let lesson = |backend: &mut CpuBackend| {
        if learns {
            distill(backend, &targets, 0.3);
            backend.optimizer_step(&STEP, Exit::Early).unwrap();
        }
    };
    for step in 0..4 {
        lesson(&mut backend);
        objective(&mut backend, Pass::Train);
        // Also between a pass and its backward, and between that and the step.
        lesson(&mut backend);
        backend.backward(&coefficients(&batch())).unwrap();
        lesson(&mut backend);
        if step < 3 {
            backend.optimizer_step(&STEP, Exit::Final).unwrap();
        }
    }
    let numbers = |tensors: BTreeMap<String, Tensor>| {
        let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        tensors.into_iter().map(|(k, t)| (k, flat(t))).collect()
    };
    [
        numbers(backend.export_trainable(Exit::Final).unwrap()),
        numbers(backend.export_gradients().unwrap()),
        numbers(backend.export_optimizer(Exit::Final).unwrap()),
    ]
}

#[test]
fn the_policy_is_the_same_whether_the_exit_learns_or_not() {
    let config = LoraConfig {
        r: 2,
        alpha: 4.0,
        targets: vec!["all-linear".to_owned()],
    };
    for trainable in [full(), Trainable::Lora { config, seed: 3 }] {
        let learning = updated(&trainable, true);
        assert!(learning.iter().all(|numbers| !numbers.is_empty()));
        assert_eq!(learning, updated(&trainable, false));
    }
}

#[test]
fn an_exit_goes_on_from_its_files_exactly() {
    let targets = soft_targets(&batch());
    let mut first = with_exit(Family::Llama, &Trainable::Nothing);
    let lessons = |backend: &mut CpuBackend| {
        let mut lesson = |_| {
            let loss = distill(backend, &targets, 0.1);
            (
                loss,
                backend
                    .optimizer_step(&STEP, Exit::Early)
                    .unwrap()
                    .to_bits(),
            )
        };
        (0..5).map(&mut lesson).collect::<Vec<_>>()
    };
    lessons(&mut first);
    let mut second = with_exit(Family::Llama, &Trainable::Nothing);
    let weights = first.export_trainable(Exit::Early).unwrap();
    second.import(&weights, Exit::Early).unwrap();
    let optimizer = first.export_optimizer(Exit::Early).unwrap();
    second.import_optimizer(&optimizer, Exit::Early).unwrap();
    assert_eq!(lessons(&mut first), lessons(&mut second));

    let mut fewer = weights;
    fewer.remove("draft_head.adapter.weight");
    let error = second.add_early_exit(1, Some(&fewer)).unwrap_err();
    assert!(matches!(error, PolicyError::MissingWeight { name } if name.contains("adapter")));
}

#[test]
fn an_exit_that_cannot_be_is_refused() {
    let spec = tiny_spec(Family::Llama);
    let weights = random_weights(&spec);
    let mut backend = CpuBackend::new(spec, &weights, &Trainable::Nothing, false).unwrap();
    for layers in [0, 2, 9] {
        let refused = backend.add_early_exit(layers, None);
        assert!(matches!(refused, Err(PolicyError::Misuse(_))), "{layers}");
    }
    let none = backend.optimizer_step(&STEP, Exit::Early);
    assert!(matches!(none, Err(PolicyError::Misuse(_))));
}
