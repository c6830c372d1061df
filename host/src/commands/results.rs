//! `grpo-host results RUN`: a run in numbers, also while it is going on.

use super::table;
use crate::{cli::ResultsArgs, run::summarise};

/// Prints the summary of a run directory as a table or one JSON object.
pub(super) fn run(args: &ResultsArgs) -> anyhow::Result<()> {
    let summary = summarise(&args.run)?;
    if args.output.json {
        outln!("{}", serde_json::to_string(&summary)?);
        return Ok(());
    }
    let plugins: Vec<&str> = summary.plugins.iter().map(|p| p.id.name.as_str()).collect();
    outln!(
        "{}: {} steps, {}",
        args.run.display(),
        summary.steps,
        plugins.join(", ")
    );
    let width = summary
        .metrics
        .iter()
        .map(|m| m.name.len())
        .max()
        .unwrap_or(0);
    outln!(
        "{:width$}  {:>12} {:>12} {:>12} {:>12} {:>12}",
        "",
        "first",
        "last",
        "mean",
        "min",
        "max"
    );
    for m in &summary.metrics {
        let cells = [m.first, m.last, m.mean, m.min, m.max].map(short);
        outln!("{:width$}  {}", m.name, cells.join(" "));
    }
    if let Some(report) = &summary.curriculum {
        outln!("\ncurriculum at step {}", report.step);
        for line in report.tables.iter().flat_map(table::lines) {
            outln!("{line}");
        }
    }
    Ok(())
}

/// Twelve columns, five digits.
fn short(x: f64) -> String {
    match x.abs() {
        0.0 => format!("{:>12}", 0),
        a if (1e-3..1e6).contains(&a) => format!("{x:>12.5}"),
        _ => format!("{x:>12.4e}"),
    }
}
