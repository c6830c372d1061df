//! A formatter plugin: rows to prompts, completions to reasoning and answer.

use super::check;
use super::error::{Call, PluginError};
use super::sandbox::{Loaded, Wall};
use super::v0_1::{formatting, wit};
use super::warm::{Open, Pool, Share};
use crate::types::{Parsed, PluginId, Prompt};

/// A loaded formatter.
pub struct FormatterPlugin {
    // Before `loaded`, so that instances go before what they are made of.
    pool: Pool<formatting::Guest>,
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
    pub(super) fn new(loaded: Loaded, share: Option<Share>) -> Result<Self, PluginError> {
        let exports = formatting::GuestIndices::new(&loaded.pre).map_err(|e| loaded.misfit(&e))?;
        let plugin = Self {
            pool: Pool::new(share),
            loaded,
            exports,
        };
        let wall = plugin.loaded.wall();
        plugin
            .pool
            .lease(|stays| plugin.open(wall, stays))?
            .put_back();
        Ok(plugin)
    }

    /// Role, name and digest.
    pub fn id(&self) -> &PluginId {
        &self.loaded.id
    }

    /// The prompt of each row, in order, from one instance: a fresh one, or one of a warm pool.
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

    /// Reasoning and answer of each completion, in order, from one instance.
    ///
    /// # Errors
    /// After the retries of `on_failure: retry`.
    pub fn parse(&self, completions: &[&str]) -> Result<Vec<Parsed>, PluginError> {
        let wall = self.loaded.wall();
        self.loaded.with_retries(|| {
            let mut lease = self.pool.lease(|stays| self.open(wall, stays))?;
            let Open { session, guest, .. } = lease.open();
            session.renew(wall);
            let parsed = self.loaded.call(session, Call::Parse, |store, _| {
                guest.call_parse(store, completions)
            })?;
            let parsed = check::length(parsed, completions.len())
                .map_err(|fault| self.loaded.error(Call::Parse, fault))?;
            let checked: Result<_, _> = parsed
                .into_iter()
                .map(|parsed| check::parsed(parsed, &self.loaded.reach.secrets))
                .collect();
            let checked = checked.map_err(|fault| self.loaded.error(Call::Parse, fault))?;
            lease.keep();
            Ok(checked)
        })
    }

    fn format_once(&self, rows: &[RowText<'_>], wall: Wall) -> Result<Vec<Prompt>, PluginError> {
        let mut lease = self.pool.lease(|stays| self.open(wall, stays))?;
        let Open { session, guest, .. } = lease.open();
        session.renew(wall);
        let texts: Vec<&str> = rows.iter().map(|row| row.json).collect();
        let prompts: Vec<wit::Prompt> = self.loaded.call(session, Call::Format, |store, _| {
            guest.call_format(store, &texts)
        })?;
        let error = |fault| self.loaded.error(Call::Format, fault);
        let prompts = check::length(prompts, rows.len()).map_err(error)?;
        let prompt = |(prompt, row): (_, &RowText<'_>)| {
            check::prompt(prompt, &self.loaded.reach.secrets).map_err(|fault| PluginError {
                row: Some(row.id),
                ..error(fault)
            })
        };
        let prompts = prompts.into_iter().zip(rows).map(prompt);
        let prompts = prompts.collect::<Result<_, _>>()?;
        lease.keep();
        Ok(prompts)
    }

    fn open(&self, wall: Wall, stays: bool) -> Result<Open<formatting::Guest>, PluginError> {
        let mut session = self.loaded.start(wall, stays)?;
        let guest = self
            .loaded
            .call(&mut session, Call::Configure, |store, instance| {
                let guest = self.exports.load(&mut *store, instance)?;
                let configured = guest.call_configure(store, &self.loaded.config)?;
                Ok(configured.map(|()| guest))
            })?;
        Ok(Open::new(session, guest))
    }
}
