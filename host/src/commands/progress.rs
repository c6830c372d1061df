//! Progress on stderr: a bar on a terminal, a line now and then elsewhere, nothing when quiet.

use std::time::{Duration, Instant};

use grpo_policy::engine::Progress;
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::table;
use crate::{evaluate::EvalReport, hub, trainer::StepReport};

/// How often a line is printed where there is no terminal to draw on.
const LINE_EVERY: Duration = Duration::from_secs(10);

const TEMPLATE: &str = "{bar:24.cyan/dim} {pos}/{len} {msg} [{elapsed} < {eta}]";

/// Steps of a run, with reward and speed.
pub(super) struct Bar {
    bar: ProgressBar,
    total: u64,
    quiet: bool,
    /// Whether to print what the curriculum reports.
    tables: bool,
    /// No terminal: print lines instead.
    lines: bool,
    last_line: Instant,
    message: String,
}

impl Bar {
    pub(super) fn new(total: u64, done: u64, quiet: bool) -> Self {
        let bar = ProgressBar::new(total);
        if quiet {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
            bar.set_style(style);
        }
        bar.set_position(done);
        let lines = bar.is_hidden() && !quiet;
        // Far enough back that the first line appears at once.
        let last_line = Instant::now()
            .checked_sub(LINE_EVERY)
            .unwrap_or_else(Instant::now);
        Self {
            bar,
            total,
            quiet,
            tables: true,
            lines,
            last_line,
            message: String::new(),
        }
    }

    /// Leaves out what the curriculum reports.
    pub(super) fn without_tables(mut self) -> Self {
        self.tables = false;
        self
    }

    /// A step of the engine.
    pub(super) fn rollout(&mut self, progress: Progress) {
        let waiting = progress.running + progress.waiting;
        self.bar
            .set_message(format!("{} · {waiting} sequences left", self.message));
    }

    pub(super) fn step(&mut self, report: &StepReport) {
        let speed = report.sampling.tokens as f64 / report.seconds.total.max(1e-9);
        let reward = report.advantages.stats.reward;
        let reward = reward.map_or("–".to_owned(), |r| format!("{r:.3}"));
        self.message = format!("reward {reward} · {speed:.0} tok/s");
        self.bar.set_message(self.message.clone());
        self.bar.set_position(report.step);
        if self.tables {
            for line in report.plan.report.iter().flat_map(table::lines) {
                self.print(&line);
            }
        }
        if let Some(line) = report.nothing_learnt() {
            self.print(&line);
        }
        if self.lines && (self.last_line.elapsed() >= LINE_EVERY || report.step == self.total) {
            eprintln!("step {}/{} · {}", report.step, self.total, self.message);
            self.last_line = Instant::now();
        }
    }

    /// Steps of a run that are scored again, out of all.
    pub(super) fn replayed(&mut self, done: u64) {
        self.bar.set_position(done);
        if self.lines && self.last_line.elapsed() >= LINE_EVERY {
            eprintln!("step {done}/{} scored again", self.total);
            self.last_line = Instant::now();
        }
    }

    pub(super) fn eval(&mut self, eval: &EvalReport) {
        let percent =
            |x: Option<f64>| x.map_or("–".to_owned(), |x| format!("{:.1} %", 100.0 * x));
        let (strict, flexible) = (
            percent(eval.accuracy_strict),
            percent(eval.accuracy_flexible),
        );
        let reward = eval.reward.map_or("–".to_owned(), |r| format!("{r:.3}"));
        let rows = eval.n;
        self.print(&format!(
            "held-out at step {}: strict {strict}, flexible {flexible}, reward {reward} ({rows} rows)",
            self.bar.position()
        ));
    }

    /// What is going on now; without a terminal a line of its own, since nothing else would show.
    pub(super) fn say(&mut self, what: &str) {
        if self.bar.is_hidden() {
            self.print(what);
        }
        self.bar.set_message(format!("{} · {what}", self.message));
    }

    /// Something that happened beside the steps.
    pub(super) fn note(&self, line: &str) {
        self.print(line);
    }

    /// Something that did not stop the run; shown also when quiet.
    pub(super) fn warn(&mut self, text: &str) {
        self.bar.suspend(|| eprintln!("warning: {text}"));
    }

    fn print(&self, line: &str) {
        if !self.quiet {
            self.bar.suspend(|| eprintln!("{line}"));
        }
    }

    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Reports downloads, one line when a file begins and one every ten seconds.
pub(super) fn downloads(quiet: bool) -> impl FnMut(hub::Progress<'_>) {
    let mut current = String::new();
    let mut last = Instant::now();
    move |progress: hub::Progress<'_>| {
        let new = current != progress.file;
        if quiet || (!new && last.elapsed() < LINE_EVERY) {
            return;
        }
        progress.file.clone_into(&mut current);
        last = Instant::now();
        let total = progress
            .total
            .map_or("?".to_owned(), |n| HumanBytes(n).to_string());
        eprintln!(
            "downloading {}: {} of {total}",
            progress.file,
            HumanBytes(progress.done)
        );
    }
}

/// Steps of supervised fine-tuning, with the loss.
pub(super) struct SftBar(ProgressBar);

impl SftBar {
    pub(super) fn new(total: u64, quiet: bool) -> Self {
        let bar = ProgressBar::new(total);
        if quiet {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
            bar.set_style(style);
        }
        Self(bar)
    }

    pub(super) fn step(&self, step: u64, report: &crate::sft::SftReport) {
        self.0.set_position(step);
        self.0.set_message(format!("loss {:.4}", report.loss));
    }

    pub(super) fn finish(&self) {
        self.0.finish_and_clear();
    }
}
