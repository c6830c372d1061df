//! Shadowing of a formatter: which prompts and answers of a step a candidate would have made otherwise.

use serde::{Deserialize, Serialize};

use super::shadow::thread_seconds;
use crate::{
    plugin::{FormatterPlugin, PluginError, RowText},
    rollout::Rollouts,
    types::{Parsed, Prompt},
};

/// A row of a step, its completions, and what the formatter that counts made of them.
pub struct TappedGroup {
    row_id: u64,
    row: String,
    prompt: Prompt,
    completions: Vec<String>,
    parsed: Vec<Parsed>,
}

impl TappedGroup {
    pub(super) fn of(rollouts: &Rollouts) -> Self {
        let text = |c: &crate::types::Completion| c.text.clone();
        Self {
            row_id: rollouts.row,
            row: rollouts.row_json.clone(),
            prompt: rollouts.formatted.clone(),
            completions: rollouts.completions.iter().map(text).collect(),
            parsed: rollouts.parsed.clone(),
        }
    }
}

/// What has been found so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TextReport {
    pub prompts: u64,
    /// Those that it would have made otherwise.
    pub prompts_differ: u64,
    pub completions: u64,
    /// Those in which it would have read another answer, or none, or one where there was none.
    pub answers_differ: u64,
    /// The same of the reasoning.
    pub reasonings_differ: u64,
    /// Microseconds of processor time for a completion, its part of the prompt included.
    pub micros: Option<f64>,
}

impl std::fmt::Display for TextReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} of {} prompts differ, {} answers and {} reasonings of {} completions",
            self.prompts_differ,
            self.prompts,
            self.answers_differ,
            self.reasonings_differ,
            self.completions
        )?;
        match self.micros {
            Some(micros) => write!(f, ", {micros:.1} µs a completion"),
            None => Ok(()),
        }
    }
}

/// Sums over the steps of one candidate.
#[derive(Default)]
pub(super) struct TextShadow {
    report: TextReport,
    seconds: f64,
}

impl TextShadow {
    /// Formats and parses a step with the candidate.
    ///
    /// # Errors
    /// The first failure: in the run it would have been the end of a step.
    pub(super) fn add(
        &mut self,
        candidate: &FormatterPlugin,
        groups: &[TappedGroup],
    ) -> Result<(), PluginError> {
        let row = |group: &TappedGroup| (group.row_id, group.row.clone());
        let rows: Vec<(u64, String)> = groups.iter().map(row).collect();
        let texts: Vec<RowText<'_>> = rows
            .iter()
            .map(|(id, json)| RowText { id: *id, json })
            .collect();
        let completions: Vec<&str> = groups
            .iter()
            .flat_map(|g| g.completions.iter().map(String::as_str))
            .collect();
        let begun = thread_seconds();
        let prompts = candidate.format(&texts)?;
        let parsed = candidate.parse(&completions)?;
        self.seconds += thread_seconds() - begun;
        let count = |differ: &mut dyn Iterator<Item = bool>| differ.filter(|d| *d).count() as u64;
        let live = || groups.iter().flat_map(|g| &g.parsed);
        let report = &mut self.report;
        report.prompts += prompts.len() as u64;
        report.completions += parsed.len() as u64;
        let mut others = prompts.iter().zip(groups).map(|(p, g)| *p != g.prompt);
        report.prompts_differ += count(&mut others);
        let mut others = parsed.iter().zip(live()).map(|(a, b)| a.answer != b.answer);
        report.answers_differ += count(&mut others);
        let pairs = parsed.iter().zip(live());
        report.reasonings_differ += count(&mut pairs.map(|(a, b)| a.reasoning != b.reasoning));
        Ok(())
    }

    pub(super) fn report(&self) -> TextReport {
        let completions = self.report.completions;
        TextReport {
            micros: (completions > 0).then(|| self.seconds * 1e6 / completions as f64),
            ..self.report.clone()
        }
    }
}
