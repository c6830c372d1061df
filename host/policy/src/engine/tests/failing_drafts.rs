//! Drafts that end before the policy does: with a shorter context, or by diverging.

use super::scripted::{ScriptedBackend, tokenizer};
use crate::{
    backend::Backend,
    engine::{
        Engine, EngineConfig,
        draft::{Draft, DraftFault, Length, Model, Source},
    },
    types::{Completion, Request, SamplingParams},
};

const SALT: u64 = 77;
const NEW_TOKENS: u32 = 30;

/// Four tokens at a time of `backend`.
fn draft(backend: ScriptedBackend) -> Draft<ScriptedBackend> {
    let policy = ScriptedBackend::new(SALT).spec().clone();
    let model = Model::new(backend, &policy).unwrap();
    let mut draft = Draft::new(Source::Model(Box::new(model)), Length::Fixed(4)).unwrap();
    draft.learn_from(1);
    draft
}

/// Completions of six prompts of 6 to 51 tokens.
fn generate(draft: Option<&mut Draft<ScriptedBackend>>, temperature: f32) -> Vec<Completion> {
    let request = |id: u64| Request {
        id,
        prompt: vec![4; 6 + 9 * id as usize],
        n: 2,
        sampling: SamplingParams {
            temperature,
            max_tokens: NEW_TOKENS,
            ignore_eos: true,
            ..SamplingParams::default()
        },
        seed: id,
    };
    // Long prompts come in several parts.
    let mut engine = Engine::new(EngineConfig {
        max_batch: 12,
        max_step_tokens: 20,
        ..EngineConfig::default()
    })
    .unwrap();
    let (policy, requests) = (&mut ScriptedBackend::new(SALT), (0..6).map(request));
    let completions = engine
        .generate(policy, draft, &tokenizer(), requests.collect(), &mut |_| ())
        .unwrap();
    assert_eq!(policy.violations, 0);
    completions
}

fn tokens(completions: &[Completion]) -> Vec<&[u32]> {
    completions.iter().map(|c| &c.tokens[..]).collect()
}

fn drafted(completions: &[Completion]) -> u32 {
    completions.iter().map(|c| c.telemetry.draft_tokens).sum()
}

#[test]
fn a_draft_with_a_shorter_context_drafts_up_to_its_end() {
    let context = 24;
    let mut twin = draft(ScriptedBackend::with_context(SALT, context));
    let completions = generate(Some(&mut twin), 0.0);
    assert_eq!(tokens(&completions), tokens(&generate(None, 0.0)));
    let policy = ScriptedBackend::new(SALT);
    let (twin, _) = twin.learner(&policy).unwrap();
    assert_eq!(twin.violations, 0, "it ran beyond its context");
    for c in &completions {
        let t = &c.telemetry;
        assert_eq!(t.accepted_tokens, t.draft_tokens, "a twin is always right");
        // The first token comes with the prompt; the last one drafted is not run.
        let behind_prompt = t.prompt_tokens as usize + 1;
        let reached = t.draft_tokens > 0;
        assert_eq!(reached, behind_prompt <= context, "{t:?}");
        assert!(behind_prompt + t.draft_tokens as usize <= context.max(behind_prompt) + 1);
    }
    assert!(drafted(&completions) > 20);
}

#[test]
fn a_draft_that_diverges_is_given_up_and_the_rest_is_as_without_it() {
    // Sampling with a draft uses other random numbers, so only one that never drafted is as none there.
    for (temperature, at) in [(0.0, 1), (0.0, 9), (0.9, 1)] {
        let mut backend = ScriptedBackend::new(SALT);
        backend.diverges_at = Some(at);
        let mut failing = draft(backend);
        for round in 0..2 {
            let completions = generate(Some(&mut failing), temperature);
            assert_eq!(tokens(&completions), tokens(&generate(None, temperature)));
            assert_eq!(drafted(&completions) > 0, at > 1 && round == 0);
            assert!(completions.iter().all(|c| c.top.len() < c.tokens.len()));
        }
        assert_eq!(failing.fault(), Some(DraftFault::Logits));
        assert!(failing.learner(&ScriptedBackend::new(SALT)).is_none());
    }
}
