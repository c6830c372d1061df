//! `grpo-host train`: opens or resumes the run directory, drives the trainer, keeps the record.

mod locks;
mod summary;

use std::{io::ErrorKind, path::PathBuf, sync::Arc, time::Instant};

use anyhow::Context;

use super::guest_log::guest_log;
use super::progress::{Bar, downloads};
use crate::{
    cli::{Environment, OutputArgs, TrainArgs},
    config::{RawConfig, RunConfig},
    draft,
    evaluate::EvalReport,
    failures,
    interrupt::Interrupt,
    judge::Panel,
    placement,
    policy::{Mode, Policy},
    record,
    run::{
        Keep, LockedDraft, LockedPlugin, Resumed, RunDir, StepLog, TrainState, read_metrics,
        write_report,
    },
    setup,
    swap::{Line, Swaps, restore},
    trainer::{StepReport, Supervision, Trainer, loss_config},
};
pub(super) use locks::check_lock;
pub use locks::{GrantsChanged, LockMissing, PluginChanged};
use summary::Summary;

/// Trains, and prints a short table or one JSON object.
pub(super) fn run(args: &TrainArgs, environment: &Environment) -> anyhow::Result<()> {
    let (config, place) = open(args)?;
    let interrupt = Interrupt::listen(|| {
        eprintln!("\nstopping after this step or evaluation; once more to stop at once, which loses nothing that is saved: `--resume` goes on from the last checkpoint");
    })
    .context("cannot listen for Ctrl-C")?;
    let quiet = args.output.quiet;
    super::set_threads(config.hardware.threads)?;
    let mut run = Run::prepare(&config, place, environment, quiet)?;
    if let Some(odd) = config.idle_patience() {
        eprintln!("warning: {odd}");
    }
    let outcome = run.train(&interrupt, &args.output)?;
    let summary = run.finish(&outcome)?;
    if args.output.json {
        outln!("{}", summary.json());
    } else {
        out!("{}", summary.table());
    }
    match outcome.interrupted {
        true => Err(Interrupted {
            run_dir: run.dir.root().to_owned(),
        }
        .into()),
        false => Ok(()),
    }
}

/// The user stopped the run; nothing is lost.
#[derive(Debug, thiserror::Error)]
#[error("stopped on request; the state is in {}", run_dir.display())]
pub struct Interrupted {
    run_dir: PathBuf,
}

impl Interrupted {
    /// How to go on.
    pub fn hint(&self) -> Option<String> {
        Some(format!(
            "continue with `grpo-host --resume {}`",
            self.run_dir.display()
        ))
    }
}

/// Where a run goes. A new one's folder is made only when plugins, rows and model have been loaded, so
/// that bad input leaves nothing behind.
enum Place {
    /// `None`: the next free number under `runs/`.
    New(Option<PathBuf>),
    Resumed(Box<Resumed>),
}

/// Config and place of a new or a resumed run.
fn open(args: &TrainArgs) -> anyhow::Result<(RunConfig, Place)> {
    if let Some(root) = &args.resume {
        let resumed = RunDir::resume(root)?;
        let saved = RawConfig::from_yaml(&resumed.dir.config()?, &root.display().to_string())?;
        let before = saved.validate()?;
        let config = args.over(saved)?.validate()?;
        loss_config(&config.loss).validate()?;
        refuse_changes(&before, &config)?;
        let step = resumed.checkpoint.as_ref().map_or(0, |c| c.state.step);
        for damage in &resumed.damages {
            eprintln!("warning: {damage}: going back to the checkpoint of step {step}");
        }
        if resumed.lost_swap {
            eprintln!(
                "warning: the last line of swaps.jsonl is incomplete: a swap that it told of is undone"
            );
        }
        return Ok((config, Place::Resumed(Box::new(resumed))));
    }
    let config = super::config_over_defaults(|base| args.over(base))?;
    loss_config(&config.loss).validate()?;
    let root = config.output.output_dir.clone();
    if let Some(root) = &root {
        RunDir::refuse_existing(root)?;
    }
    Ok((config, Place::New(root)))
}

/// Makes `runs/N` with the first free number; two runs that start together get two numbers.
fn new_run_folder() -> anyhow::Result<PathBuf> {
    let runs = PathBuf::from("runs");
    std::fs::create_dir_all(&runs).context("cannot create runs")?;
    for number in 1..10_000 {
        let root = runs.join(format!("{number:04}"));
        match std::fs::create_dir(&root) {
            Ok(()) => return Ok(root),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot create {}", root.display()));
            }
        }
    }
    anyhow::bail!("runs/ is full: 9999 runs")
}

/// A trainer with its record.
struct Run<'a> {
    trainer: Trainer<'a>,
    dir: RunDir,
    metrics: StepLog,
    curriculum: StepLog,
    swaps: Swaps,
    started: Instant,
    /// Wall time of earlier sessions.
    wall_before: f64,
}

/// Settings that a resumed run cannot take: its history would not be one.
#[derive(Debug, thiserror::Error)]
#[error("a resumed run cannot change {}", keys.iter().map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", "))]
pub struct ResumeChanges {
    keys: Vec<String>,
}

impl ResumeChanges {
    /// What would do what is wanted.
    pub fn hint(&self) -> Option<String> {
        Some("leave it out, or start a new run from this one's model: --model RUN/model".to_owned())
    }
}

/// How long a run goes, what it evaluates and saves and where it computes may change; what it learns from
/// and how may not.
fn refuse_changes(before: &RunConfig, now: &RunConfig) -> anyhow::Result<()> {
    let mut may = before.clone();
    may.training.max_steps = now.training.max_steps;
    may.eval = now.eval.clone();
    // Held-out rows may come off the training rows.
    may.eval.eval_rows = before.eval.eval_rows;
    may.output = now.output.clone();
    // The run stays where it is.
    may.output.output_dir = before.output.output_dir.clone();
    may.hardware = now.hardware.clone();
    may.plugins.trusted_keys = now.plugins.trusted_keys.clone();
    may.judges = before.judges.paced_as(&now.judges);
    may.plugins.watch_plugins = now.plugins.watch_plugins;
    may.plugins.swap_shadow_steps = now.plugins.swap_shadow_steps;
    may.plugins.swap_max_failure_rate = now.plugins.swap_max_failure_rate;
    if may == *now {
        return Ok(());
    }
    let lines = |config: &RunConfig| -> anyhow::Result<serde_json::Map<String, serde_json::Value>> {
        Ok(serde_norway::from_str(&config.to_yaml()?)?)
    };
    let (may, now) = (lines(&may)?, lines(now)?);
    let changed = now
        .iter()
        .filter(|(key, value)| may.get(*key) != Some(*value));
    let keys = changed.map(|(key, _)| key.clone()).collect();
    Err(ResumeChanges { keys }.into())
}

/// How the loop ended.
struct Outcome {
    interrupted: bool,
    /// Out of patience before the last step.
    stopped_early: bool,
}

impl<'a> Run<'a> {
    fn prepare(
        config: &'a RunConfig,
        place: Place,
        environment: &Environment,
        quiet: bool,
    ) -> anyhow::Result<Self> {
        let mut on_download = downloads(quiet);
        let sink = guest_log();
        let plugins = match &place {
            Place::New(_) => {
                setup::plugins(config, environment, &mut on_download, Arc::clone(&sink))?
            }
            Place::Resumed(resumed) => {
                // From its own copies where it swaps them.
                let root = resumed.dir.root();
                let kept = restore::with_kept_components(config, root)?;
                let sink = Arc::clone(&sink);
                let mut plugins = setup::plugins(&kept, environment, &mut on_download, sink)?;
                restore::with_own_sources(&mut plugins.locked, config);
                plugins
            }
        };
        let judges = plugins.sources.judges().clone();
        let rows = setup::rows(config, environment, &mut on_download)?;
        setup::try_formatter(&plugins.formatter, &rows)?;
        let model = setup::model(config, environment, &mut on_download)?;
        let capacity = setup::capacity(&config.generation, model.spec.max_position_embeddings);
        let mut policy = Policy::new(
            model,
            setup::model_name(config),
            Mode::of(config),
            placement::Passes::of(config),
            capacity,
            &placement::Place::of(config, environment),
        )?;
        let attached = draft::attach(&mut policy, config, true, environment, &mut on_download)?;
        let locked_draft = attached.digest.map(|digest| LockedDraft {
            draft: config.generation.draft.to_string(),
            digest,
        });
        let mut state = TrainState {
            seed: config.training.seed,
            ..TrainState::default()
        };
        // What a tag stands for may change while the run goes on being what it is.
        let pinned = setup::pinned(config, &plugins.locked);
        let locks = (&plugins.locked[..], locked_draft.as_ref());
        let dir = folder(place, &pinned, locks, (&mut policy, &mut state))?;
        if let Some(locked) = &locked_draft {
            dir.write_draft_lock(locked)?;
        }
        // A resumed run has its head from the checkpoint by now.
        attached.odd.iter().for_each(|odd| super::warn(odd));
        super::tell_of_head(draft::untrained_head(&policy, config, true), quiet);
        super::tell_of_device(&policy, quiet);
        take_up(&judges, &dir, quiet)?;
        let mut trainer = Trainer {
            swaps: Supervision::new(config, &plugins.locked),
            config,
            policy,
            plugins,
            rows,
            state,
            judges,
        };
        Ok(Self {
            metrics: dir.metrics()?,
            curriculum: dir.curriculum()?,
            wall_before: trainer.state.wall_s,
            swaps: Swaps::open(&dir, &mut trainer, sink)?,
            trainer,
            dir,
            started: Instant::now(),
        })
    }

    fn train(&mut self, interrupt: &Interrupt, output: &OutputArgs) -> anyhow::Result<Outcome> {
        let config = self.trainer.config;
        let last = config.training.max_steps;
        let mut bar = Bar::new(last, self.trainer.state.step, output.quiet);
        if output.json {
            bar = bar.without_tables();
        }
        let state = &self.trainer.state;
        // A run stopped before its first step has a checkpoint that knows the evaluation.
        if state.step == 0 && config.eval.eval_on_start && state.eval_before.is_none() {
            let eval = self.evaluate(&mut bar)?;
            // A run that was ended before its first checkpoint has this line already.
            if read_metrics(self.dir.root())?.is_empty() {
                let mut line = record::Metrics::default();
                line.add_eval(&eval);
                self.account(&mut line, &mut bar);
                self.metrics.append(0, &line.0)?;
            }
        }
        // Patience is asked first: a run that had stopped and is resumed must not do another step.
        while self.trainer.state.step < last
            && !self.trainer.out_of_patience()
            && !interrupt.requested()
        {
            self.swaps.before_step(&mut self.trainer, &self.dir)?;
            self.tell_of_swaps(&mut bar);
            let report = self.trainer.step(&mut |p| bar.rollout(p));
            let (root, seed) = (self.dir.root(), config.training.seed);
            failures::save(root, seed, &mut self.trainer.swaps.rewards.failures)?;
            let report = report?;
            bar.step(&report);
            self.swaps
                .after_step(&mut self.trainer, &report, &self.dir)?;
            self.tell_of_swaps(&mut bar);
            self.record(report, &mut bar)?;
        }
        bar.finish();
        self.swaps.finish();
        let unfinished = self.trainer.state.step < last;
        let stopped_early = unfinished && self.trainer.out_of_patience();
        Ok(Outcome {
            interrupted: unfinished && !stopped_early,
            stopped_early,
        })
    }

    fn evaluate(&mut self, bar: &mut Bar) -> anyhow::Result<EvalReport> {
        bar.say(&format!("evaluating {} rows", self.trainer.rows.eval.len()));
        let eval = self.trainer.evaluate(&mut |p| bar.rollout(p))?;
        bar.eval(&eval);
        self.tell_of_fault(bar);
        Ok(eval)
    }

    fn tell_of_swaps(&mut self, bar: &mut Bar) {
        for line in self.swaps.take_lines() {
            match line {
                Line::Note(text) => bar.note(&text),
                Line::Warning(text) => bar.warn(&text),
            }
        }
    }

    /// What judges were asked since the line before, an evaluation's questions included.
    fn account(&self, line: &mut record::Metrics, bar: &mut Bar) {
        line.add_judges(&self.trainer.judges.take_usage());
        let judges = &self.trainer.judges;
        judges.take_notes().iter().for_each(|note| bar.warn(note));
    }

    fn tell_of_fault(&mut self, bar: &mut Bar) {
        if let Some(fault) = draft::take_fault(&mut self.trainer.policy, self.trainer.config) {
            bar.warn(&fault);
        }
    }

    /// Metrics, rollouts and whatever is due after this step. The metrics line comes after the
    /// curriculum's and the rollouts and before the checkpoint, so that a resumed run finds both or cuts both.
    fn record(&mut self, report: StepReport, bar: &mut Bar) -> anyhow::Result<()> {
        let (config, step) = (self.trainer.config, report.step);
        let is_last = step == config.training.max_steps;
        let every = |n: u64| n > 0 && step.is_multiple_of(n);
        let mut line = record::metrics(&report, self.trainer.state.tokens);
        for fault in &report.faults {
            bar.warn(fault);
        }
        self.tell_of_fault(bar);
        if let Some(tables) = record::curriculum(&report.plan)? {
            self.curriculum.append(step, &tables)?;
        }
        line.add_swaps(&self.swaps.take_metrics());
        let rollouts = record::rollouts(report);
        crate::run::write_rollouts(self.dir.root(), step, &rollouts)?;
        if every(config.eval.eval_steps) || (is_last && config.eval.eval_on_end) {
            let eval = self.evaluate(bar)?;
            line.add_eval(&eval);
        }
        self.account(&mut line, bar);
        self.metrics.append(step, &line.0)?;
        let improved = self
            .trainer
            .state
            .best
            .is_some_and(|best| best.step == step);
        if every(config.output.save_steps) || is_last || improved {
            self.checkpoint()?;
        }
        Ok(())
    }

    fn checkpoint(&mut self) -> anyhow::Result<()> {
        let state = &mut self.trainer.state;
        state.wall_s = self.wall_before + self.started.elapsed().as_secs_f64();
        let writer = self.dir.checkpoint(state.step)?;
        self.trainer.policy.save_checkpoint(writer.path())?;
        let last = self.trainer.config.output.save_total_limit as usize;
        writer.commit(&self.trainer.state, Keep { last, best: true })?;
        self.curriculum.sync()?;
        Ok(self.metrics.sync()?)
    }

    fn finish(&mut self, outcome: &Outcome) -> anyhow::Result<Summary> {
        let saved = crate::run::latest(self.dir.root())?;
        if saved.is_none_or(|c| c.state.step < self.trainer.state.step) {
            self.checkpoint()?;
        }
        write_report(self.dir.root())?;
        if !outcome.interrupted {
            self.trainer.policy.export(self.dir.root())?;
        }
        Summary::of(self, outcome)
    }
}

/// The run directory, and with that of an earlier session what its last checkpoint holds.
fn folder(
    place: Place,
    pinned: &RunConfig,
    (plugins, draft): (&[LockedPlugin], Option<&LockedDraft>),
    (policy, state): (&mut Policy, &mut TrainState),
) -> anyhow::Result<RunDir> {
    match place {
        Place::New(root) => {
            let root = root.map_or_else(new_run_folder, Ok)?;
            Ok(RunDir::create(&root, &pinned.to_yaml()?)?)
        }
        Place::Resumed(resumed) => {
            check_lock(resumed.dir.root(), plugins)?;
            locks::check_draft_lock(&resumed.dir, draft)?;
            if let Some(checkpoint) = resumed.checkpoint {
                policy.load_checkpoint(&checkpoint.path)?;
                *state = checkpoint.state;
            }
            let mut dir = resumed.dir;
            dir.rewrite_config(&pinned.to_yaml()?)?;
            Ok(dir)
        }
    }
}

/// Has judges know what the run has spent, since a budget is the run's and not the session's.
fn take_up(judges: &Panel, dir: &RunDir, quiet: bool) -> anyhow::Result<()> {
    judges.count_earlier(&read_metrics(dir.root())?);
    super::tell_of_judges(judges, quiet);
    Ok(())
}
