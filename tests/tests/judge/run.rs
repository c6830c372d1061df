//! Steps of a run beside judges: scoring while the next wave generates, and samples that no judge has scored.

#[path = "../hostile/guest.rs"]
#[allow(dead_code, reason = "the hostile suite uses the rest")]
mod guest;

use std::{
    path::Path,
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use grpo_host::{
    cli::Environment,
    config::{JudgeConfig, RunConfig},
    judge::Panel,
    placement::{Passes, Place},
    plugin::{Limits, LogLine, LogSink, Plugin, PluginHost, RewardSet, Weighted},
    policy::{Mode, Policy},
    run::TrainState,
    setup,
    trainer::{StepReport, Supervision, Trainer},
};
use grpo_policy::engine::Progress;
use serde_json::json;

use super::{Fault, Server, ask, config, in_time, panel};

/// Completions of one of two waves of [`run_config`].
const WAVE: usize = 4;
/// Longest wait for what must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// Says so whenever it scores, and gives every sample 1.
const SAYS_SO: &str = "(call $log (i32.const 1) (i32.const 0) (i32.const 0))";
/// The same, and skips every sample for no reason.
const SKIPS: &str = "(call $log (i32.const 1) (i32.const 0) (i32.const 0))
    (loop $next
      (local.set $at (i32.add (i32.const 4096) (i32.mul (local.get $i) (i32.const 24))))
      (i32.store8 (local.get $at) (i32.const 1))
      (i32.store offset=8 (local.get $at) (i32.const 0))
      (i32.store offset=12 (local.get $at) (i32.const 0))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br_if $next (i32.lt_u (local.get $i) (local.get $n))))";

fn run_config(scoring_waves: u32) -> RunConfig {
    let mut config = RunConfig::default();
    config.generation.prompts_per_step = 4;
    config.generation.num_generations = 2;
    config.generation.max_completion_length = 8;
    config.generation.scoring_waves = scoring_waves;
    config.eval.eval_rows = 1;
    config
}

/// A trainer of the built-in model whose one reward is `body`, with its log in `sink`.
fn trainer<'c>(config: &'c RunConfig, body: &str, sink: LogSink, judges: Panel) -> Trainer<'c> {
    let environment = Environment::default();
    let quiet = Arc::new(|_: LogLine<'_>| {});
    let mut plugins = setup::plugins(config, &environment, &mut |_| {}, quiet).unwrap();
    let limits = Limits {
        deadline_ms: 600_000,
        wall_ms: 600_000,
        ..Limits::default()
    };
    let bytes = guest::scoring_after_ones(body);
    let host = PluginHost::new(sink).unwrap();
    let Plugin::Reward(reward) = host.load("says-so", &bytes, &json!({}), &limits).unwrap() else {
        panic!("it is a reward")
    };
    let weight = 1.0;
    plugins.rewards = RewardSet::new(vec![Weighted { reward, weight }]).unwrap();
    let model = setup::model(config, &environment, &mut |_| {}).unwrap();
    let capacity = setup::capacity(&config.generation, model.spec.max_position_embeddings);
    let policy = Policy::new(
        model,
        "embedded",
        Mode::of(config),
        Passes::of(config),
        capacity,
        &Place::of(config, &environment),
    );
    Trainer {
        config,
        policy: policy.unwrap(),
        plugins,
        rows: setup::rows(config, &environment, &mut |_| {}).unwrap(),
        state: TrainState::default(),
        swaps: Supervision::default(),
        judges,
    }
}

/// Sees the engine make a step while a reward scores, however fast either is: the second wave does not go on before
/// scoring has begun, and scoring not before the engine has.
#[derive(Default)]
struct Engine {
    seen: Mutex<Seen>,
    more: Condvar,
}

#[derive(Default)]
struct Seen {
    steps: u64,
    finished: usize,
    scoring: bool,
}

impl Engine {
    fn stepped(&self, progress: Progress) {
        let mut seen = self.seen.lock().unwrap();
        let second_wave = seen.finished >= WAVE;
        seen.finished += progress.finished;
        let early = |seen: &mut Seen| second_wave && !seen.scoring;
        let waited = self.more.wait_timeout_while(seen, PATIENCE, early);
        waited.unwrap().0.steps += 1;
        self.more.notify_all();
    }

    /// Whether the engine makes a step from now on.
    fn goes_on(&self) -> bool {
        let mut seen = self.seen.lock().unwrap();
        seen.scoring = true;
        self.more.notify_all();
        let now = seen.steps;
        let waited = self
            .more
            .wait_timeout_while(seen, PATIENCE, |s| s.steps == now);
        !waited.unwrap().1.timed_out()
    }
}

/// Row, wave, tokens and log-probs of every completion.
fn drawn(report: &StepReport) -> Vec<(u64, u32, Vec<u32>, Vec<f32>)> {
    let groups = report.groups.iter().map(|group| &group.rollouts);
    let of = |group: &grpo_host::rollout::Rollouts| {
        let samples = group.completions.iter().zip(&group.waves);
        let row = group.row;
        samples
            .map(|(c, wave)| (row, *wave, c.tokens.clone(), c.logprobs.clone()))
            .collect::<Vec<_>>()
    };
    groups.flat_map(of).collect()
}

#[test]
fn a_wave_is_scored_while_the_next_one_generates() {
    let config = run_config(2);
    let engine = Arc::new(Engine::default());
    let overlapped = Arc::new(Mutex::new(Vec::new()));
    let sink: LogSink = {
        let (engine, overlapped) = (Arc::clone(&engine), Arc::clone(&overlapped));
        Arc::new(move |_: LogLine<'_>| {
            let mut seen = overlapped.lock().unwrap();
            // The last wave has nothing to be beside.
            let beside = seen.is_empty() && engine.goes_on();
            seen.push(beside);
        })
    };
    let mut trainer = trainer(&config, SAYS_SO, sink, Panel::default());
    let report = trainer
        .step(&mut |progress| engine.stepped(progress))
        .unwrap();
    assert_eq!(*overlapped.lock().unwrap(), [true, false]);
    let waves: Vec<u32> = drawn(&report).iter().map(|(_, wave, ..)| *wave).collect();
    assert_eq!(waves, [0, 0, 0, 0, 1, 1, 1, 1]);
    let scored_by: Vec<u32> = report.scored_by.iter().map(|(wave, _)| *wave).collect();
    assert_eq!(scored_by, [0, 1]);
    assert_eq!(report.sampling.completions, 8);
    assert_eq!(trainer.state.outcomes.len(), 4);
}

#[test]
fn waves_draw_the_same_however_slow_their_scores_are() {
    let config = run_config(3);
    let draw = |sink: LogSink| {
        let mut trainer = trainer(&config, SAYS_SO, sink, Panel::default());
        drawn(&trainer.step(&mut |_| {}).unwrap())
    };
    let quick = draw(Arc::new(|_: LogLine<'_>| {}));
    let slow = draw(Arc::new(|_: LogLine<'_>| {
        std::thread::park_timeout(Duration::from_millis(50));
    }));
    assert_eq!(quick, slow);
    let waves: Vec<u32> = quick.iter().map(|(_, wave, ..)| *wave).collect();
    assert_eq!(waves, [0, 0, 1, 1, 2, 2, 2, 2]);
}

/// A step whose reward asks a judge that does not answer, or asks nobody, and skips every sample.
fn skipping_step(asks: bool, waves: u32, cache: &Path) -> anyhow::Result<StepReport> {
    let server = Server::start();
    server.fail_always(Some(Fault::Status(503, "", "dying")));
    let hasty = JudgeConfig {
        max_retries: 0,
        ..config(&server)
    };
    let judges = panel(hasty, cache).unwrap();
    let asked = judges.clone();
    let sink: LogSink = Arc::new(move |_: LogLine<'_>| {
        if asks {
            let judge = asked.get("good").unwrap();
            assert!(ask(judge, &["how good?"], in_time())[0].is_err());
        }
    });
    let config = run_config(waves);
    let mut trainer = trainer(&config, SKIPS, sink, judges);
    trainer.step(&mut |_| {})
}

#[test]
fn a_judge_that_fails_costs_samples_and_not_the_run() {
    let cache = tempfile::tempdir().unwrap();
    for waves in [1, 2] {
        let report = skipping_step(true, waves, cache.path()).unwrap();
        assert_eq!(report.skipped, [("says-so".to_owned(), 8)]);
        assert_eq!(report.update.tokens, 0);
        let said = report.nothing_learnt().unwrap();
        assert_eq!(
            said,
            "step 1: no group teaches: all 4 drawn have equal rewards or none"
        );
        // Nobody else is forgiven.
        let Err(error) = skipping_step(false, waves, cache.path()) else {
            panic!("no sample has a score")
        };
        let text = error.to_string();
        assert!(
            text.starts_with("every completion of step 1 was skipped"),
            "{text}"
        );
    }
}
