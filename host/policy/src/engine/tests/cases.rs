//! Single behaviours: sharing, stopping, limits, telemetry, errors.

use super::{
    scripted::{EOS, KV_BYTES, ScriptedBackend, naive, tokenizer},
    workload::assert_no_leak,
};
use crate::{
    engine::{Engine, EngineConfig},
    error::PolicyError,
    types::{Completion, Finish, Request, SamplingParams},
};

fn config() -> EngineConfig {
    EngineConfig {
        block_size: 4,
        kv_blocks: 64,
        max_batch: 8,
        max_step_tokens: 64,
        enable_prefix_cache: true,
        max_model_len: 64,
    }
}

fn request(prompt_len: usize, n: u32) -> Request {
    Request {
        id: 5,
        prompt: (0..prompt_len as u32).map(|t| t % 17).collect(),
        n,
        sampling: SamplingParams {
            max_tokens: 6,
            ignore_eos: true,
            ..SamplingParams::default()
        },
        seed: 3,
    }
}

fn run(engine: &mut Engine, backend: &mut ScriptedBackend, request: Request) -> Vec<Completion> {
    engine
        .generate(backend, None, &tokenizer(), vec![request], &mut |_| ())
        .unwrap()
}

#[test]
fn a_prompt_is_computed_once_for_all_its_completions() {
    let mut engine = Engine::new(config()).unwrap();
    let mut backend = ScriptedBackend::new(1);
    let completions = run(&mut engine, &mut backend, request(11, 4));
    // 11 prompt tokens, the last one 3 times more, and 5 sampled tokens of each that are run again.
    assert_eq!(backend.computed, 11 + 3 + 4 * 5);
    let cached: Vec<u32> = completions
        .iter()
        .map(|c| c.telemetry.cached_prompt_tokens)
        .collect();
    assert_eq!(cached, [0, 10, 10, 10]);
    // 10 shared tokens end inside a block: all but the last owner copy it, the first one its own later.
    assert_eq!(backend.copies, 3);
    // 16 cached tokens are 4 blocks: 2 full ones shared by 4, and 2 private ones.
    let bytes: Vec<u64> = completions.iter().map(|c| c.telemetry.kv_bytes).collect();
    assert_eq!(bytes, [(4 * KV_BYTES * 5 / 2) as u64; 4]);
    assert_no_leak(&engine);
    // The next call finds the two full blocks.
    let before = backend.computed;
    let again = run(&mut engine, &mut backend, request(11, 1));
    assert_eq!(again[0].telemetry.cached_prompt_tokens, 8);
    assert_eq!(again[0].tokens, completions[0].tokens);
    assert_eq!(backend.computed - before, 3 + 5);
}

#[test]
fn a_completion_does_not_depend_on_its_neighbours() {
    let alone = run(
        &mut Engine::new(config()).unwrap(),
        &mut ScriptedBackend::new(1),
        request(9, 1),
    );
    let mut other = request(20, 3);
    other.seed = 99;
    let crowd = Engine::new(config())
        .unwrap()
        .generate(
            &mut ScriptedBackend::new(1),
            None,
            &tokenizer(),
            vec![other, request(9, 5)],
            &mut |_| (),
        )
        .unwrap();
    assert_eq!(crowd[3].tokens, alone[0].tokens);
    assert_ne!(crowd[3].tokens, crowd[4].tokens);
}

#[test]
fn stop_strings_across_tokens_and_end_of_text() {
    let tokenizer = tokenizer();
    let (mut by_string, mut by_token) = (0, 0);
    for seed in 0..300 {
        let mut request = request(5, 1);
        request.seed = seed;
        request.sampling.ignore_eos = false;
        request.sampling.max_tokens = 40;
        request.sampling.stop = vec!["ST".to_owned(), "é".to_owned(), "b\n".to_owned()];
        let expected = naive(1, &request, 0, &config(), &tokenizer);
        let mut engine = Engine::new(config()).unwrap();
        let got = run(&mut engine, &mut ScriptedBackend::new(1), request).remove(0);
        assert_eq!((&got.tokens, &got.text), (&expected.tokens, &expected.text));
        assert_eq!(got.finish, expected.finish);
        assert!(!got.text.contains("ST") && !got.text.contains("<end>"));
        let ended = got.tokens.last() == Some(&EOS);
        by_token += usize::from(ended);
        by_string += usize::from(got.finish == Finish::Stop && !ended);
    }
    assert!(by_string > 50 && by_token > 50, "{by_string} {by_token}");
}

#[test]
fn length_is_max_tokens_or_the_context() {
    let mut engine = Engine::new(config()).unwrap();
    let mut backend = ScriptedBackend::new(1);
    let short = run(&mut engine, &mut backend, request(10, 1)).remove(0);
    assert_eq!((short.tokens.len(), short.finish), (6, Finish::Length));
    let long = run(&mut engine, &mut backend, request(63, 2)).remove(1);
    assert_eq!((long.tokens.len(), long.finish), (1, Finish::Length));
    assert_eq!(long.telemetry.generated_tokens, 1);
    assert_eq!(long.telemetry.prompt_tokens, 63);
}

#[test]
fn abort_returns_what_there_is_and_leaves_the_rest() {
    let tokenizer = tokenizer();
    let mut engine = Engine::new(EngineConfig {
        max_batch: 3,
        ..config()
    })
    .unwrap();
    let mut backend = ScriptedBackend::new(1);
    engine.add(request(9, 4)).unwrap();
    let kept = Request {
        id: 6,
        ..request(6, 1)
    };
    engine.add(kept.clone()).unwrap();
    for _ in 0..3 {
        assert!(
            engine
                .step(&mut backend, None, &tokenizer)
                .unwrap()
                .is_empty()
        );
    }
    let aborted = engine.abort(5, &tokenizer).unwrap();
    let lengths: Vec<usize> = aborted.iter().map(|c| c.tokens.len()).collect();
    assert_eq!(lengths, [3, 2, 0, 0]);
    assert!(aborted.iter().all(|c| c.finish == Finish::Abort));
    let mut rest = Vec::new();
    while !engine.is_idle() {
        rest.extend(engine.step(&mut backend, None, &tokenizer).unwrap());
    }
    assert_eq!(
        rest[0].tokens,
        naive(1, &kept, 0, &config(), &tokenizer).tokens
    );
    assert_no_leak(&engine);
}

#[test]
fn new_weights_in_mid_flight_recompute_everything() {
    let tokenizer = tokenizer();
    let mut engine = Engine::new(config()).unwrap();
    let mut backend = ScriptedBackend::new(1);
    engine.add(request(9, 2)).unwrap();
    engine.step(&mut backend, None, &tokenizer).unwrap();
    let before = backend.computed;
    backend.salt = 2;
    engine.invalidate_prefix_cache();
    engine.step(&mut backend, None, &tokenizer).unwrap();
    // The first sequence again: prompt and the token it had sampled.
    assert_eq!(backend.computed - before, 10);
}

#[test]
fn a_failed_step_leaves_an_empty_usable_engine() {
    let mut engine = Engine::new(config()).unwrap();
    let mut backend = ScriptedBackend::new(1);
    backend.fail_at = Some(3);
    let failed = engine.generate(
        &mut backend,
        None,
        &tokenizer(),
        vec![request(9, 3)],
        &mut |_| (),
    );
    assert!(matches!(
        failed,
        Err(PolicyError::Misuse("scripted failure"))
    ));
    assert!(engine.is_idle());
    assert_no_leak(&engine);
    let expected = naive(1, &request(9, 3), 2, &config(), &tokenizer());
    let completions = run(&mut engine, &mut backend, request(9, 3));
    assert_eq!(completions[2].tokens, expected.tokens);
}

#[test]
fn bad_requests_and_sizes_are_refused_with_their_reason() {
    let mut engine = Engine::new(config()).unwrap();
    let base = request(4, 1);
    let with = |change: fn(&mut SamplingParams)| {
        let mut request = base.clone();
        change(&mut request.sampling);
        request
    };
    let bad = [
        (request(0, 1), "the prompt is empty"),
        (request(4, 0), "n is 0"),
        (
            request(64, 1),
            "the prompt of 64 tokens leaves no room in a context of 64",
        ),
        (with(|p| p.max_tokens = 0), "max_tokens is 0"),
        (
            with(|p| p.stop = vec![String::new()]),
            "a stop string is empty",
        ),
        (
            with(|p| p.temperature = f32::NAN),
            "temperature NaN is out of range",
        ),
        (
            with(|p| p.temperature = -1.0),
            "temperature -1 is out of range",
        ),
        (with(|p| p.top_p = 0.0), "top_p 0 is out of range"),
        (with(|p| p.min_p = 1.5), "min_p 1.5 is out of range"),
        (
            with(|p| p.repetition_penalty = 0.0),
            "repetition_penalty 0 is out of range",
        ),
    ];
    for (request, reason) in bad {
        let error = engine.add(request).unwrap_err();
        assert_eq!(error.to_string(), format!("request 5: {reason}"));
        assert!(engine.is_idle());
    }
}

#[test]
fn the_longest_completion_must_fit_into_the_pool() {
    let small = EngineConfig {
        kv_blocks: 3,
        ..config()
    };
    let error = Engine::new(small.clone())
        .unwrap()
        .add(request(8, 1))
        .unwrap_err();
    assert!(
        matches!(
            error,
            PolicyError::KvExhausted {
                tokens: 14,
                needed: 4,
                available: 3
            }
        ),
        "{error}"
    );
    // One token fewer fits exactly.
    let mut fits = request(7, 3);
    fits.id = 1;
    let completions = run(
        &mut Engine::new(small).unwrap(),
        &mut ScriptedBackend::new(1),
        fits,
    );
    assert_eq!(completions.len(), 3);
    assert!(
        Engine::new(EngineConfig {
            max_step_tokens: 7,
            ..config()
        })
        .is_err()
    );
    assert!(
        Engine::new(EngineConfig {
            kv_blocks: 0,
            ..config()
        })
        .is_err()
    );
}
