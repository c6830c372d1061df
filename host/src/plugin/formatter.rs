//! A formatter plugin: rows to prompts, completions to reasoning and answer.

use super::check;
use super::error::{Call, PluginError};
use super::sandbox::{Loaded, Session, Wall};
use super::v0_1::{formatting, wit};
use crate::types::{Parsed, PluginId, Prompt};

/// A loaded formatter.
pub struct FormatterPlugin {
    loaded: Loaded,
    exports: formatting::GuestIndices,
}

/// A row for [`FormatterPlugin::format`].
#[derive(Clone, Copy, Debug)]
pub struct RowText<'a> {
    /// Dataset position, for error messages; not shown to the guest.
    pub id: u64,
    /// The row as a JSON object.
    pub json: &'a str,
}

impl FormatterPlugin {
    pub(super) fn new(loaded: Loaded) -> Result<Self, PluginError> {
        let exports = formatting::GuestIndices::new(&loaded.pre).map_err(|e| loaded.misfit(&e))?;
        let plugin = Self { loaded, exports };
        plugin.open(plugin.loaded.wall())?;
        Ok(plugin)
    }

    /// Role, name and digest.
    pub fn id(&self) -> &PluginId {
        &self.loaded.id
    }

    /// The prompt of each row, in order, from one fresh instance.
    ///
    /// # Errors
    /// After the retries of `on_failure: retry`. If a batch fails, its rows are tried one by one, and
    /// the error names the first that fails alone.
    pub fn format(&self, rows: &[RowText<'_>]) -> Result<Vec<Prompt>, PluginError> {
        let wall = self.loaded.wall();
        let whole = match self.loaded.with_retries(|| self.format_once(rows, wall)) {
            Ok(prompts) => return Ok(prompts),
            Err(error) => error,
        };
        for row in rows {
            if let Err(error) = self.format_once(std::slice::from_ref(row), wall) {
                let row = Some(row.id);
                return Err(PluginError { row, ..error });
            }
        }
        Err(whole)
    }

    /// Reasoning and answer of each completion, in order, from one fresh instance.
    ///
    /// # Errors
    /// After the retries of `on_failure: retry`.
    pub fn parse(&self, completions: &[&str]) -> Result<Vec<Parsed>, PluginError> {
        let wall = self.loaded.wall();
        self.loaded.with_retries(|| {
            let (mut session, guest) = self.open(wall)?;
            let parsed = self.loaded.call(&mut session, Call::Parse, |store, _| {
                guest.call_parse(store, completions)
            })?;
            let parsed = check::length(parsed, completions.len())
                .map_err(|fault| self.loaded.error(Call::Parse, fault))?;
            let checked: Result<_, _> = parsed.into_iter().map(check::parsed).collect();
            checked.map_err(|fault| self.loaded.error(Call::Parse, fault))
        })
    }

    fn format_once(&self, rows: &[RowText<'_>], wall: Wall) -> Result<Vec<Prompt>, PluginError> {
        let (mut session, guest) = self.open(wall)?;
        let texts: Vec<&str> = rows.iter().map(|row| row.json).collect();
        let prompts: Vec<wit::Prompt> =
            self.loaded.call(&mut session, Call::Format, |store, _| {
                guest.call_format(store, &texts)
            })?;
        let error = |fault| self.loaded.error(Call::Format, fault);
        let prompts = check::length(prompts, rows.len()).map_err(error)?;
        let prompt = |(prompt, row): (_, &RowText<'_>)| {
            check::prompt(prompt).map_err(|fault| PluginError {
                row: Some(row.id),
                ..error(fault)
            })
        };
        prompts.into_iter().zip(rows).map(prompt).collect()
    }

    fn open(&self, wall: Wall) -> Result<(Session, formatting::Guest), PluginError> {
        let mut session = self.loaded.start(wall)?;
        let guest = self
            .loaded
            .call(&mut session, Call::Configure, |store, instance| {
                let guest = self.exports.load(&mut *store, instance)?;
                let configured = guest.call_configure(store, &self.loaded.config)?;
                Ok(configured.map(|()| guest))
            })?;
        Ok((session, guest))
    }
}
