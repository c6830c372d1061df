//! `grpo-host replay RUN`: a run's completions scored again, by its own rewards or by others.

use std::path::Path;

use serde_json::json;

use super::{
    accounts::settle, guest_log::guest_log, progress::Bar, progress::downloads, train::check_lock,
    warn,
};
use crate::{
    cli::{Environment, ReplayArgs, judges},
    config::{RawConfig, RunConfig},
    grpo::filter::DynamicSampling,
    plugin::{PluginError, PluginHost, RewardSet, SetScoring},
    replay::{
        Comparison, Difference, Histogram, Log, ReplayError, Report, Rescored, ScoreWave, Side,
        Summary, difference, rescore_with,
    },
    run::{Figure, Line, LockedPlugin, read_plugins_lock, write_figures},
    setup::{self, Plugins},
    swap::restore::{self, Timeline},
    types::{Role, Sample},
};

/// Failures printed; all are counted.
const FAILURES: usize = 5;

/// Checks the run's own rewards, or compares them with others.
pub(super) fn run(args: &ReplayArgs, environment: &Environment) -> anyhow::Result<()> {
    let log = Log::find(&args.run)?;
    let mut config = RawConfig::from_file(&args.run.join("config.yaml"))?.validate()?;
    if args.other()?.is_none() {
        // The run's own rewards are to repeat what they said, by the answers that they had.
        config.judges = config.judges.offline();
    }
    if let Some(first) = log.missing.first() {
        let steps = log.missing.len();
        warn(&format!(
            "{steps} steps have no rollouts, the first of them step {first}"
        ));
    }
    if let Some(out) = &args.out {
        check_out(&args.run, out)?;
    }
    match args.other()? {
        None => check(args, &log, &config, environment),
        Some(other) => {
            let mut other = other.validate()?;
            if args.grants.is_some() {
                // The run's own answer for it, and `self` is its policy.
                other.judges = match args.judges.as_deref() {
                    Some(given) => judges(given)?.validate()?.judges,
                    None => config.judges.clone(),
                };
                other.input.model.clone_from(&config.input.model);
                other.input.revision.clone_from(&config.input.revision);
            }
            let loaded = rewards(&other, environment, args.output.quiet)?;
            compare(args, &log, &config, &other, loaded)
        }
    }
}

/// The plugins of a config; of their identities those of rewards.
fn rewards(config: &RunConfig, environment: &Environment, quiet: bool) -> anyhow::Result<Plugins> {
    let mut plugins = setup::plugins(config, environment, &mut downloads(quiet), guest_log())?;
    plugins.locked.retain(is_reward);
    Ok(plugins)
}

fn is_reward(plugin: &LockedPlugin) -> bool {
    plugin.id.role == Role::Reward
}

/// Scores every step again and hands it on; failures that policies dealt with, and how many.
fn each_step(
    args: &ReplayArgs,
    log: &Log,
    mut score: impl FnMut(u64, u32, &[Sample<'_>]) -> anyhow::Result<SetScoring>,
    mut take: impl FnMut(u64, &Rescored) -> anyhow::Result<()>,
) -> anyhow::Result<(Vec<PluginError>, usize)> {
    let quiet = args.output.quiet || args.output.json;
    let mut bar = Bar::new(log.files.len() as u64, 0, quiet);
    let (mut faults, mut count) = (Vec::new(), 0);
    for ((step, path), done) in log.files.iter().zip(1..) {
        let score: ScoreWave<'_> = &mut |wave, samples| score(*step, wave, samples);
        let mut rescored = rescore_with(*step, path, score)?;
        count += rescored.faults.len();
        let room = FAILURES - faults.len();
        faults.extend(rescored.faults.drain(..).take(room));
        take(*step, &rescored)?;
        bar.replayed(done);
    }
    bar.finish();
    Ok((faults, count))
}

fn check(
    args: &ReplayArgs,
    log: &Log,
    config: &RunConfig,
    environment: &Environment,
) -> anyhow::Result<()> {
    let kept = restore::with_kept_components(config, &args.run)?;
    let mut downloads = downloads(args.output.quiet);
    let plugins = setup::plugins(&kept, environment, &mut downloads, guest_log())?;
    let (rewards, mut locked) = (plugins.rewards, plugins.locked);
    if read_plugins_lock(&args.run)?.is_empty() {
        warn("the run has no plugins.lock: whether its components are still the same is not known");
    }
    check_lock(&args.run, &locked)?;
    let host = PluginHost::new(guest_log())?;
    let mut rewards = Timeline::of(rewards, &host, &args.run, &plugins.sources)?;
    restore::with_own_sources(&mut locked, config);
    locked.extend(rewards.promoted());
    let (locked, others): (Vec<_>, Vec<_>) = locked.into_iter().partition(is_reward);
    let score = |step, wave, samples: &[Sample<'_>]| rewards.score(step, wave, samples);
    let (mut samples, mut differing) = (0, 0);
    let mut first: Option<Difference> = None;
    let (faults, failures) = each_step(args, log, score, |_, step| {
        samples += step.rollouts.len();
        let mut found = step
            .rollouts
            .iter()
            .zip(&step.scores)
            .filter_map(|(rollout, score)| difference(rollout, score));
        if first.is_none() {
            first = found.next();
            differing += usize::from(first.is_some());
        }
        differing += found.count();
        Ok(())
    })?;
    tell_failures(&faults, failures);
    let judges = plugins.sources.judges();
    judges.take_notes().iter().for_each(|note| warn(note));
    if judges.failures() > 0 {
        warn(&format!(
            "{} questions have no answer in the judges' caches, and a replay asks nobody",
            judges.failures()
        ));
    }
    let steps = log.files.len();
    if args.output.json {
        let object = json!({
            "run_dir": args.run, "steps": steps, "missing_steps": log.missing.len(), "samples": samples,
            "differing": differing, "first": first, "failures": failures, "plugins": locked,
            "others": others,
        });
        outln!("{object}");
    } else {
        let names: Vec<&str> = rewards.names().collect();
        let (run, names) = (args.run.display(), names.join(", "));
        outln!("{run}: {steps} steps, {samples} samples, {differing} differ ({names})");
    }
    match first {
        None => Ok(()),
        Some(first) => Err(ReplayError::Differs {
            differing,
            samples,
            first,
            dropped_groups: config.loss.dynamic_sampling != DynamicSampling::Off,
        }
        .into()),
    }
}

fn tell_failures(faults: &[PluginError], count: usize) {
    for fault in faults {
        warn(&fault.to_string());
    }
    if count > faults.len() {
        warn(&format!(
            "{} more failures of rewards",
            count - faults.len()
        ));
    }
}

fn compare(
    args: &ReplayArgs,
    log: &Log,
    config: &RunConfig,
    other: &RunConfig,
    plugins: Plugins,
) -> anyhow::Result<()> {
    let Plugins {
        rewards,
        locked,
        sources,
        ..
    } = plugins;
    let asked = |plugin: &&LockedPlugin| {
        let mut sources = other.plugins.plugins.iter().map(|p| &p.source);
        sources.any(|source| plugin.is_from(source))
    };
    // A role that nobody plays goes to a shipped plugin, and that is not what was asked for.
    if locked.iter().find(asked).is_none() {
        let config = args.config.as_ref().map(|path| path.display().to_string());
        let source_name = config.unwrap_or_else(|| "--plugin".to_owned());
        return Err(ReplayError::NoReward { source_name }.into());
    }
    let mut comparison = Comparison::new(config.loss.scale_rewards);
    let score = |_, _, samples: &[Sample<'_>]| Ok(rewards.score(samples)?);
    let (faults, failures) = each_step(args, log, score, |number, step| {
        Ok(comparison.add(number, step)?)
    })?;
    let report = comparison.report();
    tell_failures(&faults, failures);
    let judges = settle(sources.judges());
    if args.output.json {
        let mut object = serde_json::to_value(&report)?;
        object["run_dir"] = json!(args.run);
        object["missing_steps"] = json!(log.missing.len());
        object["plugins"] = json!(locked);
        object["failures"] = json!(failures);
        object["judges"] = json!(judges);
        object["first_failure"] = json!(faults.first().map(ToString::to_string));
        outln!("{object}");
    } else {
        print(args, &report, &rewards);
        for (judge, asked) in &judges {
            outln!("judge  {}", asked.show(judge));
        }
    }
    if let Some(path) = &args.out {
        let title = format!("{}: logged and other rewards", args.run.display());
        write_figures(path, &title, &figures(&report), &table(&report))?;
    }
    Ok(())
}

/// Whether figures can go to `out`, before anything is scored.
fn check_out(run: &Path, out: &Path) -> Result<(), ReplayError> {
    let refuse = |reason| {
        let path = out.to_owned();
        Err(ReplayError::Out { path, reason })
    };
    let folder = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let (Ok(folder), Ok(run)) = (folder.canonicalize(), run.canonicalize()) else {
        return refuse("its folder does not exist");
    };
    if folder.starts_with(run) {
        return refuse("it is inside the run, which replay leaves as it is");
    }
    match out.is_dir() {
        true => refuse("it is a folder"),
        false => Ok(()),
    }
}

fn print(args: &ReplayArgs, report: &Report, rewards: &RewardSet) {
    let names: Vec<&str> = rewards.names().collect();
    let (run, names) = (args.run.display(), names.join(", "));
    outln!(
        "{run}: {} steps, {} samples; new: {names}\n",
        report.steps,
        report.samples
    );
    for row in table(report) {
        let mut cells = row.iter();
        let head = cells.next().map_or("", String::as_str);
        let cells: String = cells.map(|cell| format!(" {cell:>11}")).collect();
        outln!("{head:<7}{cells}");
    }
    if let Some(histogram) = &report.histogram {
        outln!();
        print_histogram(histogram);
    }
    let number = |x: Option<f64>| x.map_or("–".to_owned(), |x| format!("{x:.4}"));
    let (pearson, spearman) = (number(report.pearson), number(report.spearman));
    outln!("\ncorrelation of totals: Pearson {pearson}, Spearman {spearman}");
    let a = &report.advantages;
    let share = a.sign_flip_share;
    let share = share.map_or("–".to_owned(), |s| format!("{:.1} %", 100.0 * s));
    outln!(
        "advantages: {} of {} change their sign ({share}), {} come from or go to 0",
        a.sign_flips,
        a.compared,
        a.to_or_from_zero
    );
    outln!(
        "groups of equal reward: {} → {} of {}",
        a.flat_groups_old,
        a.flat_groups_new,
        a.groups
    );
    if report.newly_skipped + report.newly_scored > 0 {
        let (skipped, scored) = (report.newly_skipped, report.newly_scored);
        outln!("skipped only now: {skipped}; only in the log: {scored}");
    }
    if !report.most_changed.is_empty() {
        outln!("\n   step      row          old          new  completion");
    }
    for c in &report.most_changed {
        outln!(
            "{:>7} {:>8} {:>12.5} {:>12.5}  {}",
            c.step,
            c.row,
            c.old,
            c.new,
            c.completion
        );
    }
}

/// Old against new; the first row is the head.
fn table(report: &Report) -> Vec<Vec<String>> {
    let head = ["", "mean", "std", "min", "median", "max", "skipped"];
    let row = |name: &str, side: &Side| {
        let totals = side.totals.as_ref();
        let numbers = totals.map(|t| [t.mean, t.std, t.min, t.median, t.max]);
        let numbers = numbers.map_or_else(
            || vec!["–".to_owned(); 5],
            |numbers| numbers.map(|x| format!("{x:.5}")).to_vec(),
        );
        let skipped = format!("{:.1} %", 100.0 * side.skipped_share);
        let cells = [name.to_owned()].into_iter().chain(numbers);
        cells.chain([skipped]).collect()
    };
    vec![
        head.map(str::to_owned).to_vec(),
        row("logged", &report.old),
        row("new", &report.new),
    ]
}

fn print_histogram(histogram: &Histogram) {
    const WIDTH: u64 = 24;
    let most = histogram.old.iter().chain(&histogram.new).max();
    let most = most.copied().unwrap_or(0).max(1);
    // A bin that is not empty shows.
    let bar = |count: u64| "█".repeat((count * WIDTH).div_ceil(most) as usize);
    outln!("{:>12} {:>12}  {:<33} new", "from", "to", "logged");
    let counts = histogram.old.iter().zip(&histogram.new);
    for (edges, (old, new)) in histogram.edges.windows(2).zip(counts) {
        let (left, right) = (bar(*old), bar(*new));
        outln!(
            "{:>12.5} {:>12.5}  {old:>8} {left:<24} {new:>8} {right}",
            edges[0],
            edges[1]
        );
    }
}

type Quartile = fn(&Summary) -> f64;

/// The distribution as steps, and the quartiles over the run.
fn figures(report: &Report) -> Vec<Figure> {
    let mut figures = Vec::new();
    if let Some(h) = &report.histogram {
        let steps = |counts: &[u64]| -> Vec<(f64, f64)> {
            let bins = h.edges.windows(2).zip(counts);
            bins.flat_map(|(edges, n)| [(edges[0], *n as f64), (edges[1], *n as f64)])
                .collect()
        };
        figures.push(Figure {
            title: "Samples by total reward".to_owned(),
            lines: vec![line("logged", steps(&h.old)), line("new", steps(&h.new))],
        });
    }
    let quartiles: [(&str, Quartile); 3] = [
        ("Lower quartile", |s| s.q25),
        ("Median", |s| s.median),
        ("Upper quartile", |s| s.q75),
    ];
    for (title, quartile) in quartiles {
        let steps = || report.per_step.iter();
        let point = |step: u64, s: &Option<_>| s.as_ref().map(|s| (step as f64, quartile(s)));
        figures.push(Figure {
            title: format!("{title} of a step"),
            lines: vec![
                line(
                    "logged",
                    steps().filter_map(|s| point(s.step, &s.old)).collect(),
                ),
                line(
                    "new",
                    steps().filter_map(|s| point(s.step, &s.new)).collect(),
                ),
            ],
        });
    }
    figures
}

fn line(name: &str, points: Vec<(f64, f64)>) -> Line {
    let name = name.to_owned();
    Line { name, points }
}
