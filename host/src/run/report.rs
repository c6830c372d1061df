//! `report.html`: curves and samples of a run in one file without scripts or links.

use std::{fmt::Write, path::Path};

use serde_json::{Map, Value};

use super::{
    CurriculumReport, Rollout, RunError, Summary, atomic, read_rollouts, results, rollout_files,
    step_log, summarise,
    svg::{self, Series, escape, number},
};

/// Charts and the metrics they show; a chart without any of them is left out.
const CHARTS: [(&str, &[&str]); 11] = [
    ("Reward", &["reward", "reward_std"]),
    (
        "Evaluation accuracy",
        &["eval_accuracy_strict", "eval_accuracy_flexible"],
    ),
    (
        "Completion length (tokens)",
        &[
            "completions/mean_length",
            "completions/min_length",
            "completions/max_length",
        ],
    ),
    ("Entropy (nats)", &["entropy"]),
    ("KL to the reference (nats)", &["kl"]),
    (
        "KL of sampling and training (nats)",
        &["sampling/kl", "policy/old_kl"],
    ),
    ("Gradient norm", &["grad_norm"]),
    ("Loss", &["loss"]),
    ("Groups of equal reward (share)", &["frac_reward_zero_std"]),
    (
        "Draft tokens accepted (share)",
        &["spec_decode/acceptance_rate"],
    ),
    ("Step time (s)", &["step_time"]),
];

/// Charts of one metric of every bucket of a curriculum, by what follows `curriculum/bucket_I/`.
const BUCKET_CHARTS: [(&str, &str); 2] = [
    ("Rollouts per row of a bucket", "/rollouts"),
    ("Share of the rows in a bucket", "/share"),
];

/// Samples shown, and characters of each.
const SAMPLES: usize = 12;
const SAMPLE_CHARS: usize = 1500;

pub(super) const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;\
padding:0 1em;color:#1f2937;background:#fff}h1{font-size:1.5em}h2{font-size:1.1em;margin-top:2em}\
h3{font-size:1em}p{margin:.3em 0;font-size:13px}\
table{border-collapse:collapse;width:100%;font-size:13px}td,th{border-bottom:1px solid #e5e7eb;\
padding:4px 8px;text-align:left;vertical-align:top}td.n,th.n{text-align:right;\
font-variant-numeric:tabular-nums}pre{white-space:pre-wrap;word-break:break-word;margin:0;font-size:12px}\
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(420px,1fr));gap:1em}\
figure{margin:0}figcaption{font-weight:600}svg{width:100%}svg text{font-size:11px;fill:#6b7280}\
.grid{stroke:#e5e7eb}.key{font-weight:400;font-size:12px;margin-left:.8em}";

/// Writes the report from what is in the run directory. Called at checkpoints and at the end.
pub fn write_report(root: &Path) -> Result<(), RunError> {
    let summary = summarise(root)?;
    let lines = step_log::read_metrics(root)?;
    let samples = match rollout_files(root)?.pop() {
        Some((_, path)) => read_rollouts(&path)?,
        None => Vec::new(),
    };
    let config = root.join("config.yaml");
    let config = std::fs::read_to_string(&config).map_err(|source| RunError::Read {
        path: config.clone(),
        source,
    })?;
    let html = page(&summary, &lines, &samples, &config);
    atomic::write(&root.join("report.html"), html.as_bytes())
}

fn page(
    summary: &Summary,
    lines: &[Map<String, Value>],
    samples: &[Rollout],
    config: &str,
) -> String {
    let name = summary
        .run_dir
        .file_name()
        .map_or_else(String::new, |n| n.to_string_lossy().into());
    let title = escape(&format!("Run {name}, {} steps", summary.steps));
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         <style>{STYLE}</style></head><body><h1>{title}</h1>\n<div class=\"charts\">"
    );
    for (title, names) in CHARTS {
        out.push_str(&figure(title, names, lines));
    }
    for (title, suffix) in BUCKET_CHARTS {
        out.push_str(&figure(title, &of_buckets(summary, suffix), lines));
    }
    out.push_str("</div>\n");
    if let Some(report) = &summary.curriculum {
        curriculum_tables(&mut out, report);
    }
    sample_table(&mut out, samples);
    plugin_table(&mut out, summary);
    metric_table(&mut out, summary);
    // Writing to a String cannot fail, here and below.
    _ = writeln!(
        out,
        "<h2>Configuration</h2><pre>{}</pre></body></html>",
        escape(config)
    );
    out
}

fn figure(title: &str, names: &[&str], lines: &[Map<String, Value>]) -> String {
    let shown: Vec<Series<'_>> = names
        .iter()
        .map(|name| Series {
            name,
            points: results::series(lines, name),
        })
        .filter(|s| !s.points.is_empty())
        .collect();
    drawn(title, &shown)
}

/// A chart with its title and legend; nothing without a line.
pub(super) fn drawn(title: &str, shown: &[Series<'_>]) -> String {
    if shown.is_empty() {
        return String::new();
    }
    let key = |(i, s): (usize, &Series<'_>)| {
        format!(
            "<span class=\"key\" style=\"color:{}\">{}</span>",
            svg::colour(i),
            escape(s.name)
        )
    };
    let keys: String = shown.iter().enumerate().map(key).collect();
    format!(
        "<figure><figcaption>{title}{keys}</figcaption>{}</figure>\n",
        svg::chart(shown)
    )
}

/// Names of the metrics of all buckets that end in `suffix`.
fn of_buckets<'s>(summary: &'s Summary, suffix: &str) -> Vec<&'s str> {
    let names = summary.metrics.iter().map(|m| m.name.as_str());
    let mut found: Vec<&str> = names
        .filter(|n| n.starts_with("curriculum/bucket_") && n.ends_with(suffix))
        .collect();
    // A bucket that only later epochs have would come after the rest of the file.
    found.sort_unstable();
    found
}

fn curriculum_tables(out: &mut String, report: &CurriculumReport) {
    _ = write!(
        out,
        "<h2>Curriculum at step {}, epoch {}</h2>",
        report.step,
        number(report.epoch)
    );
    for table in &report.tables {
        let right = table.numeric_columns();
        let class = |column: usize| if right[column] { " class=\"n\"" } else { "" };
        _ = write!(out, "<h3>{}</h3><table><tr>", escape(&table.title));
        for (i, head) in table.columns.iter().enumerate() {
            _ = write!(out, "<th{}>{}</th>", class(i), escape(head));
        }
        for row in &table.rows {
            out.push_str("</tr><tr>");
            for (i, cell) in row.iter().enumerate() {
                _ = write!(out, "<td{}>{}</td>", class(i), escape(cell));
            }
        }
        out.push_str("</tr></table>\n");
        for note in &table.notes {
            _ = writeln!(out, "<p>{}</p>", escape(note));
        }
    }
}

fn sample_table(out: &mut String, samples: &[Rollout]) {
    let Some(first) = samples.first() else { return };
    _ = write!(
        out,
        "<h2>Samples of step {}</h2><table><tr><th>Prompt</th><th>Completion</th>\
         <th class=\"n\">Reward</th><th class=\"n\">Advantage</th><th>End</th></tr>",
        first.step
    );
    for sample in samples.iter().take(SAMPLES) {
        let reward = match (sample.reward, &sample.skip) {
            (Some(reward), _) => number(reward),
            (None, Some(reason)) => format!("skipped: {}", escape(reason)),
            (None, None) => "skipped".to_owned(),
        };
        _ = write!(
            out,
            "<tr><td><pre>{}</pre></td><td><pre>{}</pre></td><td class=\"n\">{reward}</td>\
             <td class=\"n\">{}</td><td>{:?}</td></tr>",
            shortened(&sample.prompt),
            shortened(&sample.completion.text),
            number(sample.advantage),
            sample.completion.finish,
        );
    }
    out.push_str("</table>\n");
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(SAMPLE_CHARS) {
        Some((end, _)) => format!("{} …", escape(&text[..end])),
        None => escape(text),
    }
}

fn plugin_table(out: &mut String, summary: &Summary) {
    if summary.plugins.is_empty() {
        return;
    }
    out.push_str(
        "<h2>Plugins</h2><table><tr><th>Role</th><th>Name</th><th>Digest</th><th>Source</th>\
         <th class=\"n\">Weight</th><th class=\"n\">From step</th></tr>",
    );
    for plugin in &summary.plugins {
        _ = write!(
            out,
            "<tr><td>{:?}</td><td>{}</td><td><pre>{}</pre></td><td>{}</td><td class=\"n\">{}</td>\
             <td class=\"n\">{}</td></tr>",
            plugin.id.role,
            escape(&plugin.id.name),
            escape(&plugin.id.digest),
            escape(&plugin.source),
            plugin.weight.map_or_else(String::new, number),
            plugin.since_step,
        );
    }
    out.push_str("</table>\n");
}

fn metric_table(out: &mut String, summary: &Summary) {
    out.push_str("<h2>All metrics</h2><table><tr><th>Name</th>");
    for head in ["First", "Last", "Least", "Most", "Mean"] {
        _ = write!(out, "<th class=\"n\">{head}</th>");
    }
    out.push_str("</tr>");
    for m in &summary.metrics {
        _ = write!(out, "<tr><td>{}</td>", escape(&m.name));
        for value in [m.first, m.last, m.min, m.max, m.mean] {
            _ = write!(out, "<td class=\"n\">{}</td>", number(value));
        }
        out.push_str("</tr>");
    }
    out.push_str("</table>\n");
}
