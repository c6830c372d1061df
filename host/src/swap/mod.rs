//! Swapping plugins while a run goes on: requests come over a socket in the run directory or from watched files; a
//! candidate is compiled, checked and shadows beside the steps, is promoted between two of them, and rolled back if it fails.
//!
//! This file decides; threads do the work: [`channel`] talks to clients, [`candidate`] makes a plugin of a file, [`watch`]
//! looks at files. [`restore`] finds the plugins of a run again. Nobody here makes a step wait.

mod candidate;
pub mod channel;
mod error;
mod intake;
pub mod protocol;
pub mod restore;
pub mod shadow;
pub mod shadow_plans;
pub mod shadow_texts;
mod vectors;
mod watch;

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    },
};

use crate::{
    plugin::{LogSink, Plugin, PluginHost},
    run::{LockedPlugin, RunDir, SwapEvent, SwapRecord, read_plugins_lock, read_swaps},
    setup::PluginSources,
    trainer::{RolledBack, StepReport, Trainer},
    types::Role,
};

use candidate::{Job, Message};
use channel::{Control, Incoming};
pub use error::SwapError;
use intake::{Active, id_of, keep_files, metrics_of, next_plan, record_of, seat_of};
use protocol::Event;
pub use protocol::Line;
use shadow::{Tap, TappedStep};
use shadow_texts::TappedGroup;
pub use vectors::ConformanceError;
use watch::{Watch, Watched};

/// Requests that may wait for the end of a step.
const QUEUE: usize = 8;
/// Most steps that a candidate may shadow.
pub const MAX_SHADOW: u32 = 1000;
/// Steps that a candidate may be behind before it is handed no more.
const BACKLOG: u32 = 4;

/// The swaps of a run in progress.
pub struct Swaps {
    root: PathBuf,
    requests: Receiver<Incoming>,
    control: Option<Control>,
    watch: Option<Watch>,
    /// Made for the first candidate.
    host: Option<Arc<PluginHost>>,
    sink: LogSink,
    sources: Arc<PluginSources>,
    active: Option<Active>,
    /// Changed files that wait for the candidate before them.
    waiting: VecDeque<Incoming>,
    /// Promotions that a resumed run has yet to make again.
    pending: Vec<(SwapRecord, Plugin)>,
    /// Everything that is in `plugins.lock`.
    history: Vec<LockedPlugin>,
    /// A row of the data as JSON, for conformance vectors.
    row: String,
    /// Whether a formatter shadows the step that is under way.
    tap_groups: bool,
    lines: Vec<Line>,
    metrics: Vec<(&'static str, f64)>,
}

impl Swaps {
    /// Opens the control channel of a run and takes up what it has swapped so far. A channel that cannot be had is a line
    /// among [`Swaps::take_lines`].
    ///
    /// # Errors
    /// A journal that cannot be read; components of earlier swaps that are gone or have changed.
    pub fn open(dir: &RunDir, trainer: &mut Trainer<'_>, sink: LogSink) -> anyhow::Result<Self> {
        let root = dir.root().to_owned();
        let known = read_plugins_lock(&root)?;
        let history = match known.is_empty() {
            true => trainer.plugins.locked.clone(),
            false => known,
        };
        let mut lines = Vec::new();
        keep_files(&root, &trainer.plugins.locked, &mut lines)?;
        let (sender, requests) = sync_channel(QUEUE);
        let control = channel::listen(&root, sender.clone());
        let control = control.map_err(|error| {
            let text =
                format!("no `plugin swap` for this run, for want of a control channel: {error}");
            lines.push(Line::Warning(text));
        });
        let first = trainer.rows.train.rows.first();
        let mut swaps = Self {
            row: first.map_or_else(
                || Ok("{}".to_owned()),
                |row| serde_json::to_string(&row.json),
            )?,
            root,
            requests,
            control: control.ok(),
            watch: None,
            host: None,
            sink,
            sources: Arc::clone(&trainer.plugins.sources),
            active: None,
            waiting: VecDeque::new(),
            pending: Vec::new(),
            history,
            tap_groups: false,
            lines,
            metrics: Vec::new(),
        };
        swaps.take_up(trainer)?;
        dir.write_plugins_lock(&swaps.history)?;
        swaps.watch(trainer, sender)?;
        Ok(swaps)
    }

    fn take_up(&mut self, trainer: &mut Trainer<'_>) -> anyhow::Result<()> {
        let records = read_swaps(&self.root)?;
        if records.is_empty() {
            return Ok(());
        }
        let host = self.host()?;
        let root = self.root.clone();
        restore::restore(trainer, (&host, &self.sources), &root, &records)?;
        let step = trainer.state.step;
        for record in records {
            if record.event == SwapEvent::Promoted && record.step > step {
                let plugin = restore::load(&host, &self.sources, &root, &record)?;
                self.pending.push((record, plugin));
            }
        }
        Ok(())
    }

    fn watch(
        &mut self,
        trainer: &Trainer<'_>,
        requests: SyncSender<Incoming>,
    ) -> anyhow::Result<()> {
        if !trainer.config.plugins.watch_plugins {
            return Ok(());
        }
        let files = trainer.swaps.seats().into_iter().filter_map(|seat| {
            let path = Path::new(&trainer.swaps.settings(seat)?.source);
            let id = id_of(trainer, seat)?;
            path.exists().then(|| Watched::new(seat, path, &id.digest))
        });
        self.watch = Some(Watch::start(files.collect(), requests)?);
        Ok(())
    }

    fn host(&mut self) -> anyhow::Result<Arc<PluginHost>> {
        if let Some(host) = &self.host {
            return Ok(Arc::clone(host));
        }
        let host = Arc::new(PluginHost::beside_others(Arc::clone(&self.sink))?);
        self.host = Some(Arc::clone(&host));
        Ok(host)
    }

    /// What happened since, for the run's user.
    pub fn take_lines(&mut self) -> Vec<Line> {
        std::mem::take(&mut self.lines)
    }

    /// What happened since, for the metrics.
    pub fn take_metrics(&mut self) -> Vec<(&'static str, f64)> {
        std::mem::take(&mut self.metrics)
    }

    /// Between two steps: promotes what is ready and takes requests. Waits for nobody.
    ///
    /// # Errors
    /// A journal or lock that cannot be written.
    pub fn before_step(&mut self, trainer: &mut Trainer<'_>, dir: &RunDir) -> anyhow::Result<()> {
        self.promote_again(trainer, dir)?;
        self.hear();
        self.promote(trainer, dir)?;
        while let Some(incoming) = self.next_request() {
            self.begin(trainer, incoming);
        }
        let shadowing = self
            .active
            .as_ref()
            .filter(|a| a.sent < a.shadow && a.sent - a.done < BACKLOG);
        let seat = shadowing.map(|active| active.seat);
        trainer.swaps.rewards.tap = seat.filter(|s| s.role == Role::Reward).map(|seat| Tap {
            slot: seat.slot,
            waves: Vec::new(),
        });
        let plans = seat.filter(|s| s.role == Role::Curriculum);
        trainer.swaps.plans = plans.map(|_| Vec::new());
        self.tap_groups = seat.is_some_and(|s| s.role == Role::Formatter);
        Ok(())
    }

    /// After a step: notes rollbacks, and hands the step to a candidate that shadows.
    ///
    /// # Errors
    /// A journal or lock that cannot be written.
    pub fn after_step(
        &mut self,
        trainer: &mut Trainer<'_>,
        report: &StepReport,
        dir: &RunDir,
    ) -> anyhow::Result<()> {
        for text in std::mem::take(&mut trainer.swaps.notes) {
            let event = Event::Note { text };
            self.lines.push(Line::of(&event));
            if let Some(active) = &self.active {
                active.tell(event);
            }
        }
        for rolled_back in trainer.take_rolled_back() {
            self.note_rollback(rolled_back, dir)?;
        }
        let step = trainer.state.step;
        if let Some(active) = self
            .active
            .take_if(|a| a.promoted.is_some_and(|first| first <= step))
        {
            active.tell(Event::Kept { step });
        }
        let tapped = self.tapped(trainer, report);
        if let Some(active) = &mut self.active
            && !tapped.is_empty()
            && active.worker.steps.send(tapped).is_ok()
        {
            active.sent += 1;
        }
        self.hear();
        Ok(())
    }

    /// The step, as far as somebody shadows it.
    fn tapped(&mut self, trainer: &mut Trainer<'_>, report: &StepReport) -> TappedStep {
        let groups = report.groups.iter().filter(|_| self.tap_groups);
        TappedStep {
            waves: trainer
                .swaps
                .rewards
                .tap
                .take()
                .map_or_else(Vec::new, |tap| tap.waves),
            groups: groups.map(|g| TappedGroup::of(&g.rollouts)).collect(),
            plans: trainer.swaps.plans.take().unwrap_or_default(),
        }
    }

    /// Tells those who wait that the run ends.
    pub fn finish(&mut self) {
        self.hear();
        if let Some(active) = self.active.take() {
            active.tell(Event::Ended {});
        }
        while let Ok(incoming) = self.requests.try_recv() {
            if let Some(reply) = incoming.reply {
                drop(reply.send(Event::Ended {}));
            }
        }
        if let Some(control) = &self.control {
            control.drain();
        }
    }

    /// The next request that can be begun; what cannot wait is refused.
    fn next_request(&mut self) -> Option<Incoming> {
        while let Ok(incoming) = self.requests.try_recv() {
            match (&self.active, &incoming.reply) {
                (None, _) => return Some(incoming),
                (Some(_), Some(reply)) => {
                    let event = channel::refused("another swap is going on", "wait for it to end");
                    drop(reply.send(event));
                }
                (Some(_), None) => {
                    self.waiting.retain(|known| known.seat != incoming.seat);
                    self.waiting.push_back(incoming);
                }
            }
        }
        match self.active {
            None => self.waiting.pop_front(),
            Some(_) => None,
        }
    }

    fn begin(&mut self, trainer: &Trainer<'_>, incoming: Incoming) {
        let reply = incoming.reply.clone();
        match self.start(trainer, incoming) {
            Ok(active) => self.active = Some(active),
            Err(event) => {
                self.lines.push(Line::of(&event));
                if let Some(reply) = reply {
                    drop(reply.send(event));
                }
            }
        }
    }

    fn start(&mut self, trainer: &Trainer<'_>, incoming: Incoming) -> Result<Active, Event> {
        let request = incoming.request;
        let seat = match incoming.seat {
            Some(seat) => seat,
            None => seat_of(trainer, &request.role)?,
        };
        let plugins = &trainer.config.plugins;
        let shadow = request.shadow.unwrap_or(plugins.swap_shadow_steps);
        if shadow > MAX_SHADOW {
            let reason = format!("{shadow} steps to shadow are more than {MAX_SHADOW}");
            return Err(channel::refused(&reason, "shadow fewer"));
        }
        let mut settings = trainer.swaps.settings(seat).cloned().unwrap_or_default();
        settings.source = request.source;
        settings.config = request.config.unwrap_or(settings.config);
        settings.limits = request.limits.unwrap_or(settings.limits);
        let job = Job {
            root: self.root.clone(),
            sources: Arc::clone(&self.sources),
            seat,
            settings: settings.clone(),
            shadow,
            max_failure_rate: plugins.swap_max_failure_rate,
            row: self.row.clone(),
            next: next_plan(trainer),
        };
        let host = self.host();
        let worker = host.and_then(|host| Ok(candidate::start(host, job)?));
        let worker = worker.map_err(|e| Event::Refused {
            reason: e.to_string(),
            hint: None,
        })?;
        Ok(Active {
            seat,
            settings,
            reply: incoming.reply,
            worker,
            shadow,
            sent: 0,
            done: 0,
            report: None,
            ready: None,
            promoted: None,
        })
    }

    /// Takes in what the candidate's thread has said.
    fn hear(&mut self) {
        while let Some(active) = &mut self.active {
            let message = match active.worker.messages.try_recv() {
                Ok(message) => message,
                Err(TryRecvError::Disconnected)
                    if active.ready.is_none() && active.promoted.is_none() =>
                {
                    Message::Refused {
                        reason: "its thread ended".to_owned(),
                        hint: None,
                    }
                }
                Err(_) => return,
            };
            let event = match message {
                Message::Compiled { id, milliseconds } => Event::Compiled {
                    name: id.name,
                    digest: id.digest,
                    milliseconds,
                },
                Message::Shadowed { step, report } => {
                    active.done = step;
                    active.report = Some(report.clone());
                    self.metrics.extend(metrics_of(&report));
                    let of = active.shadow;
                    Event::Shadowed { step, of, report }
                }
                Message::Ready { plugin, source } => {
                    active.settings.source = source;
                    active.ready = Some(plugin);
                    return;
                }
                Message::Refused { reason, hint } => Event::Refused { reason, hint },
            };
            self.lines.push(Line::of(&event));
            let over = event.is_last();
            active.tell(event);
            if over {
                self.active = None;
            }
        }
    }

    fn promote(&mut self, trainer: &mut Trainer<'_>, dir: &RunDir) -> anyhow::Result<()> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let Some(plugin) = active.ready.take() else {
            return Ok(());
        };
        let step = trainer.state.step + 1;
        let (seat, id, settings) = (active.seat, plugin.id().clone(), active.settings.clone());
        let replaced = id_of(trainer, seat);
        let replaced = replaced.unwrap_or_else(|| id.clone());
        let shadow = active.report.as_ref().map(serde_json::to_value);
        let record = SwapRecord {
            shadow: shadow.transpose()?,
            ..record_of(
                SwapEvent::Promoted,
                (step, 0),
                (seat, id.clone(), replaced),
                &settings,
            )
        };
        let event = Event::Promoted {
            step,
            digest: id.digest.clone(),
        };
        self.lines.push(Line::of(&event));
        self.metrics.push(("swap/promoted", 1.0));
        active.promoted = Some(step);
        active.tell(event);
        let source = PathBuf::from(&settings.source);
        if let Some(watch) = self.watch.as_ref().filter(|_| source.exists()) {
            watch.follow(Watched::new(seat, &source, &id.digest));
        }
        dir.swaps()?.append_swap(&record)?;
        trainer.promote(seat.slot, *plugin, settings, step);
        self.lock_in(trainer, &id.digest, dir)
    }

    /// The promotions that a run has made which was then killed before a checkpoint: they are in the journal.
    fn promote_again(&mut self, trainer: &mut Trainer<'_>, dir: &RunDir) -> anyhow::Result<()> {
        let step = trainer.state.step + 1;
        let (due, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.pending)
            .into_iter()
            .partition(|(record, _)| record.step <= step);
        self.pending = later;
        for (record, plugin) in due {
            let text = format!(
                "swap: promoted again at step {step}: {}",
                record.plugin.digest
            );
            self.lines.push(Line::Note(text));
            self.metrics.push(("swap/promoted", 1.0));
            trainer.promote(record.slot, plugin, restore::settings(&record), step);
            self.lock_in(trainer, &record.plugin.digest, dir)?;
        }
        Ok(())
    }

    fn lock_in(&mut self, trainer: &Trainer<'_>, digest: &str, dir: &RunDir) -> anyhow::Result<()> {
        let mut locked = trainer.plugins.locked.iter();
        let now = locked.find(|l| l.id.digest == digest && !self.history.contains(l));
        self.history.extend(now.cloned());
        Ok(dir.write_plugins_lock(&self.history)?)
    }

    fn note_rollback(&mut self, rolled_back: RolledBack, dir: &RunDir) -> anyhow::Result<()> {
        let RolledBack {
            step,
            wave,
            seat,
            from,
            to,
            settings,
            reason,
        } = rolled_back;
        let event = Event::RolledBack {
            step,
            reason: reason.clone(),
        };
        self.lines.push(Line::of(&event));
        self.metrics.push(("swap/rolled_back", 1.0));
        if let Some(active) = self
            .active
            .take_if(|a| a.seat == seat && a.promoted.is_some())
        {
            active.tell(event);
        }
        let who = (seat, to.id.clone(), from.id);
        dir.swaps()?.append_swap(&SwapRecord {
            reason: Some(reason),
            ..record_of(SwapEvent::RolledBack, (step, wave), who, &settings)
        })?;
        self.history.push(to);
        Ok(dir.write_plugins_lock(&self.history)?)
    }
}
