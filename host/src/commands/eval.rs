//! `grpo-host eval`: accuracy and reward of a model on rows, greedy or pass@k.

use anyhow::Context;
use serde_json::json;

use super::guest_log::guest_log;
use super::progress::{Bar, downloads};
use crate::{
    cli::{Environment, EvalArgs},
    evaluate::{EvalReport, EvalSettings, Judges, evaluate},
    placement::{Passes, Place},
    policy::{Mode, Policy},
    setup,
};

/// Evaluates, and prints a short table or one JSON object.
pub(super) fn run(args: &EvalArgs, environment: &Environment) -> anyhow::Result<()> {
    let config = super::config_over_defaults(|base| args.over(base))?;
    super::set_threads(config.hardware.threads)?;
    let mut on_download = downloads(args.output.quiet);
    let plugins = setup::plugins(&config, environment, guest_log())?;
    let rows = setup::eval_rows(&config, environment, &mut on_download)?
        .context("no rows to evaluate on: give --data")?;
    let model = setup::model(&config, environment, &mut on_download)?;
    let capacity = setup::capacity(&config.generation, model.spec.max_position_embeddings);
    let name = setup::model_name(&config);
    let place = Place::of(&config, environment);
    let mut policy = Policy::new(
        model,
        name,
        Mode::Inference,
        Passes::default(),
        capacity,
        &place,
    )?;
    super::attach_draft(&mut policy, &config, environment, args.output.quiet)?;
    let judges = Judges {
        formatter: &plugins.formatter,
        rewards: &plugins.rewards,
        math: &plugins.math,
    };
    let mut bar = Bar::new(rows.len() as u64, 0, args.output.quiet);
    let settings = EvalSettings::of(&config);
    let report = evaluate(&mut policy, &judges, &rows, &settings, &mut |p| {
        bar.rollout(p)
    })?;
    bar.finish();
    super::tell_of_fault(&mut policy, &config);
    if args.output.json {
        outln!("{}", json_of(&report, settings.samples));
    } else {
        out!("{}", table(&report, settings.samples));
    }
    Ok(())
}

fn json_of(report: &EvalReport, samples: u32) -> serde_json::Value {
    json!({
        "accuracy_strict": report.accuracy_strict,
        "accuracy_flexible": report.accuracy_flexible,
        "n": report.n,
        "answered": report.answered,
        "samples": samples,
        "pass_at_k": report.pass_at_k,
        "reward": report.reward,
        "skipped": report.skipped,
        "mean_length": report.mean_length,
        "too_long": report.too_long,
        "draft_tokens": report.speculation.draft_tokens,
        "accepted_tokens": report.speculation.accepted_tokens,
        "acceptance_rate": report.speculation.acceptance_rate(),
        "drafts": report.speculation.drafts,
        "accepted_per_pos": report.speculation.accepted_per_pos,
    })
}

fn table(report: &EvalReport, samples: u32) -> String {
    let percent = |x: Option<f64>| x.map_or("–".to_owned(), |x| format!("{:.1} %", 100.0 * x));
    let mut rows = vec![
        ("rows", report.n.to_string()),
        ("strict", percent(report.accuracy_strict)),
        ("flexible", percent(report.accuracy_flexible)),
    ];
    if report.pass_at_k.is_some() {
        rows.push((
            "pass@k",
            format!("{} (k = {samples})", percent(report.pass_at_k)),
        ));
    }
    let reward = report.reward.map_or("–".to_owned(), |r| format!("{r:.3}"));
    rows.push(("reward", reward));
    rows.push(("length", format!("{:.1} tokens", report.mean_length)));
    rows.extend(report.speculation.acceptance().map(|text| ("draft", text)));
    if report.skipped + report.too_long > 0 {
        let text = format!(
            "{} not scored, {} prompts too long",
            report.skipped, report.too_long
        );
        rows.push(("left out", text));
    }
    rows.iter()
        .map(|(name, value)| format!("{name:>9}  {value}\n"))
        .collect()
}
