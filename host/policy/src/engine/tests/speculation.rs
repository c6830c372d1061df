//! Speculation changes nothing but the speed: greedy completions token for token, sampled ones in
//! distribution, whatever drafts.

use super::{
    scripted::{EOS, ScriptedBackend, TOKENS, logits_after, mix, naive, tokenizer},
    workload::{Dice, assert_no_leak},
};
use crate::{
    backend::Backend,
    engine::{
        Engine, EngineConfig, Progress,
        draft::{Draft, Length, Model, Source, Suffix},
        sampler::{
            distribution,
            tests::{DRAWS, p_value},
        },
    },
    error::PolicyError,
    types::{Completion, Finish, Request, SamplingParams, Telemetry},
};

/// The model the policy is; another salt is another model.
const SALT: u64 = 77;

type Maker = fn(u64) -> Source<ScriptedBackend>;

fn model(salt: u64, policy: u64) -> Source<ScriptedBackend> {
    let backend = ScriptedBackend::new(salt);
    let spec = ScriptedBackend::new(policy).spec().clone();
    Source::Model(Box::new(Model::new(backend, &spec).unwrap()))
}

/// Every kind of draft, made for a policy of the given salt.
const KINDS: [(&str, Maker); 5] = [
    ("ngram", |_| Source::Ngram),
    ("suffix", |_| Source::Suffix(Suffix::default())),
    ("its own twin", |salt| model(salt, salt)),
    ("a stranger", |salt| model(salt + 1, salt)),
    ("early exit", |_| Source::EarlyExit),
];

fn lengths() -> [Length; 4] {
    [
        Length::Fixed(1),
        Length::Fixed(4),
        Length::Fixed(9),
        Length::Adaptive(5),
    ]
}

fn draft(make: Maker, salt: u64, length: Length) -> Draft<ScriptedBackend> {
    Draft::new(make(salt), length).unwrap()
}

/// Counters of one completion hang together.
fn assert_counts(c: &Completion) {
    let t = &c.telemetry;
    assert!(t.accepted_tokens <= t.draft_tokens && t.accepted_tokens <= t.generated_tokens);
    assert_eq!(c.accepted_per_pos.iter().sum::<u32>(), t.accepted_tokens);
    assert!(c.accepted_per_pos.is_sorted_by(|a, b| a >= b));
    assert!(c.accepted_per_pos.iter().all(|n| *n <= c.drafts));
}

#[test]
fn greedy_equals_plain_greedy_on_random_workloads() {
    let (mut drafted, mut accepted, mut preempted) = ([0; 5], [0; 5], 0);
    for seed in 0..150u64 {
        let mut dice = Dice(mix(seed));
        let mut requests = dice.requests();
        for request in &mut requests {
            request.sampling.temperature = 0.0;
        }
        let config = dice.config(&requests);
        let kind = (seed % 5) as usize;
        let length = lengths()[(seed / 5 % 4) as usize];
        let mut draft = draft(KINDS[kind].1, seed, length);
        let mut engine = Engine::new(config.clone()).unwrap();
        let mut backend = ScriptedBackend::new(seed);
        // The second time with what the first one taught.
        for _ in 0..2 {
            let mut count = |p: Progress| preempted += p.preempted;
            let completions = engine
                .generate(
                    &mut backend,
                    Some(&mut draft),
                    &tokenizer(),
                    requests.clone(),
                    &mut count,
                )
                .unwrap();
            assert_no_leak(&engine);
            let asked = requests
                .iter()
                .flat_map(|r| (0..r.n).map(move |index| (r, index)));
            assert_eq!(asked.clone().count(), completions.len());
            for (c, (request, index)) in completions.iter().zip(asked) {
                let expected = naive(seed, request, index, &config, &tokenizer());
                let kind = KINDS[kind].0;
                assert_eq!(c.tokens, expected.tokens, "{kind}, seed {seed}");
                assert_eq!((&c.text, c.finish), (&expected.text, expected.finish));
                assert_eq!(c.logprobs, expected.logprobs, "{kind}, seed {seed}");
                assert_eq!(c.policy_logprobs, expected.policy_logprobs);
                assert_counts(c);
            }
            drafted[kind] += sum(&completions, |t| t.draft_tokens);
            accepted[kind] += sum(&completions, |t| t.accepted_tokens);
        }
        assert_eq!(backend.violations, 0, "seed {seed}");
        assert!(backend.most_tokens <= config.max_step_tokens);
    }
    assert!(preempted > 50, "{preempted} preemptions");
    assert!(drafted.iter().all(|n| *n > 300), "{drafted:?}");
    assert!(accepted.iter().all(|n| *n > 10), "{accepted:?}");
}

fn sum(completions: &[Completion], of: fn(&Telemetry) -> u32) -> u32 {
    completions.iter().map(|c| of(&c.telemetry)).sum()
}

/// A prompt in which most tokens were followed by something, so that prompt lookup has guesses.
fn prompt() -> Vec<u32> {
    let last = 20;
    let mut prompt: Vec<u32> = (0..14)
        .flat_map(|t| [last, t, (t * 5 + 2) % 14, t])
        .collect();
    prompt.push(last);
    prompt
}

fn sampled_params() -> SamplingParams {
    SamplingParams {
        temperature: 0.8,
        top_p: 0.95,
        repetition_penalty: 1.2,
        max_tokens: 3,
        ignore_eos: true,
        ..SamplingParams::default()
    }
}

/// Exact probabilities of the second and of the third token, whatever came before.
fn marginals() -> [Vec<f64>; 2] {
    let (params, vocabulary) = (sampled_params(), TOKENS.len());
    let after = |tokens: &[u32]| {
        let history = [prompt(), tokens.to_vec()].concat();
        distribution(&logits_after(SALT, &history), &params, &history).unwrap()
    };
    let mut out = [vec![0.0; vocabulary], vec![0.0; vocabulary]];
    for (first, p1) in after(&[]).iter().enumerate() {
        for (second, p2) in after(&[first as u32]).iter().enumerate() {
            let both = f64::from(*p1) * f64::from(*p2);
            if both == 0.0 {
                continue;
            }
            out[0][second] += both;
            let third = after(&[first as u32, second as u32]);
            for (total, p3) in out[1].iter_mut().zip(&third) {
                *total += both * f64::from(*p3);
            }
        }
    }
    out
}

/// Second and third tokens of [`DRAWS`] completions, and the share of drafted tokens accepted.
fn draws(source: Source<ScriptedBackend>, trusts: bool) -> ([Vec<u32>; 2], f64) {
    let mut draft = Draft::new(source, Length::Fixed(2)).unwrap();
    let mut engine = Engine::new(EngineConfig::default()).unwrap();
    let mut backend = ScriptedBackend::new(SALT);
    backend.trusts_drafts = trusts;
    let mut tokens = [Vec::new(), Vec::new()];
    let (mut drafted, mut accepted) = (0, 0);
    for seed in 0..DRAWS / 500 {
        let request = Request {
            id: seed,
            prompt: prompt(),
            n: 500,
            sampling: sampled_params(),
            seed,
        };
        let completions = engine
            .generate(
                &mut backend,
                Some(&mut draft),
                &tokenizer(),
                vec![request],
                &mut |_| (),
            )
            .unwrap();
        for c in &completions {
            tokens[0].push(c.tokens[1]);
            tokens[1].push(c.tokens[2]);
        }
        drafted += sum(&completions, |t| t.draft_tokens);
        accepted += sum(&completions, |t| t.accepted_tokens);
    }
    assert!(drafted > 30_000, "{drafted} drafted tokens");
    (tokens, f64::from(accepted) / f64::from(drafted))
}

#[test]
fn samples_follow_the_policy_and_not_the_draft() {
    let exact = marginals();
    for (name, make) in KINDS {
        let (tokens, acceptance) = draws(make(SALT), false);
        for (i, exact) in exact.iter().enumerate() {
            let p = p_value(exact, |at| tokens[i][at as usize]);
            assert!(p > 0.01, "{name}, token {}: p = {p}", i + 2);
        }
        assert_eq!(
            acceptance == 1.0,
            ["its own twin", "early exit"].contains(&name)
        );
        let (tokens, _) = draws(make(SALT), true);
        let p = p_value(&exact[0], |at| tokens[0][at as usize]);
        let twin = ["its own twin", "early exit"].contains(&name);
        assert!(
            twin || p < 1e-6,
            "{name}: a sampler that trusts drafts passes with p = {p}"
        );
    }
}

#[test]
fn a_stop_inside_a_proposal_ends_the_completion_there() {
    let mut stopped = 0;
    for seed in 0..200 {
        let request = Request {
            id: 0,
            prompt: vec![1, 2, 3],
            n: 1,
            sampling: SamplingParams {
                max_tokens: 20,
                temperature: 0.0,
                stop: vec!["ab".to_owned(), "1".to_owned()],
                ..SamplingParams::default()
            },
            seed,
        };
        let mut draft = draft(|salt| model(salt, salt), seed, Length::Fixed(7));
        let mut engine = Engine::new(EngineConfig::default()).unwrap();
        let completion = engine
            .generate(
                &mut ScriptedBackend::new(seed),
                Some(&mut draft),
                &tokenizer(),
                vec![request.clone()],
                &mut |_| (),
            )
            .unwrap()
            .remove(0);
        let expected = naive(seed, &request, 0, engine.config(), &tokenizer());
        assert_eq!(
            (completion.tokens, completion.text),
            (expected.tokens, expected.text)
        );
        let accepted = completion.telemetry.accepted_tokens > 0;
        stopped += usize::from(completion.finish == Finish::Stop && accepted);
    }
    assert!(
        stopped > 50,
        "{stopped} completions stopped behind an accepted token"
    );
}

#[test]
fn the_same_seed_gives_the_same_completions_at_a_fixed_length() {
    let run = || {
        let mut draft = draft(|salt| model(salt + 1, salt), SALT, Length::Fixed(3));
        let mut engine = Engine::new(EngineConfig::default()).unwrap();
        let request = Request {
            id: 0,
            prompt: vec![4, 5, 6],
            n: 8,
            sampling: SamplingParams {
                max_tokens: 30,
                ..SamplingParams::default()
            },
            seed: 5,
        };
        let backend = &mut ScriptedBackend::new(SALT);
        let completions = engine
            .generate(
                backend,
                Some(&mut draft),
                &tokenizer(),
                vec![request],
                &mut |_| (),
            )
            .unwrap();
        completions
            .into_iter()
            .map(|c| c.tokens)
            .collect::<Vec<_>>()
    };
    let first = run();
    assert_eq!(first, run());
    assert!(first.iter().any(|tokens| tokens.last() == Some(&EOS)));
}

#[test]
fn drafts_that_cannot_be_are_refused() {
    let mut other = ScriptedBackend::new(1).spec().clone();
    other.vocab_size += 1;
    let error = Model::new(ScriptedBackend::new(1), &other).err().unwrap();
    assert!(matches!(
        error,
        PolicyError::DraftVocabulary {
            draft: 24,
            policy: 25
        }
    ));
    assert!(Draft::<ScriptedBackend>::new(Source::Ngram, Length::Fixed(0)).is_err());
}
