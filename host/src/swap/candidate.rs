//! A candidate on a thread of its own: compiled, checked and shadowing beside the steps, at low priority.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    time::Instant,
};

use anyhow::Context;

use super::{
    SwapError,
    shadow::{Shadow, ShadowReport, TappedStep},
    shadow_plans::{PlanShadow, TappedPlan},
    shadow_texts::TextShadow,
    vectors,
};
use crate::{
    config::PluginConfig,
    error,
    plugin::{Plugin, PluginError, PluginHost},
    run::keep_component,
    setup::{self, Loaded, PluginSources},
    types::{PluginId, Seat},
};

/// How much nicer than the run its thread is. Of a core that the run wants too it gets a thirtieth, so that a step which waits for
/// all cores is hardly longer (10, a tenth, could be seen in the steps); at 19 it would get a hundredth, and large components would
/// not be compiled in time.
const NICENESS: i32 = 15;

/// What a candidate is to be.
pub(super) struct Job {
    pub(super) root: PathBuf,
    pub(super) sources: Arc<PluginSources>,
    pub(super) seat: Seat,
    pub(super) settings: PluginConfig,
    /// Steps to shadow.
    pub(super) shadow: u32,
    pub(super) max_failure_rate: f64,
    /// A row of the run as JSON.
    pub(super) row: String,
    /// What the run's curriculum will be asked next; nobody has planned it yet.
    pub(super) next: TappedPlan,
}

/// What its thread says.
pub(super) enum Message {
    Compiled {
        id: PluginId,
        milliseconds: f64,
    },
    Shadowed {
        step: u32,
        report: ShadowReport,
    },
    Ready {
        plugin: Box<Plugin>,
        /// Of the component; a reference is pinned.
        source: String,
    },
    Refused {
        reason: String,
        hint: Option<String>,
    },
}

/// The near end of the thread.
pub(super) struct Worker {
    pub(super) messages: Receiver<Message>,
    pub(super) steps: Sender<TappedStep>,
}

/// Starts a thread that makes a candidate of a component.
///
/// # Errors
/// A thread that cannot be had.
pub(super) fn start(host: Arc<PluginHost>, job: Job) -> std::io::Result<Worker> {
    let (say, messages) = channel();
    let (steps, waves) = channel();
    std::thread::Builder::new()
        .name("candidate".to_owned())
        .spawn(move || {
            let last = match prepare(&host, &job, &say, &waves) {
                Ok((plugin, source)) => Message::Ready {
                    plugin: Box::new(plugin),
                    source,
                },
                Err(refusal) => {
                    let (reason, hint) = error::message_and_hint(&refusal);
                    let reason = error::one_line(&reason);
                    Message::Refused { reason, hint }
                }
            };
            // The run may have ended.
            drop(say.send(last));
        })?;
    Ok(Worker { messages, steps })
}

fn prepare(
    host: &PluginHost,
    job: &Job,
    say: &Sender<Message>,
    steps: &Receiver<TappedStep>,
) -> anyhow::Result<(Plugin, String)> {
    rustix::process::nice(NICENESS).context("cannot lower the priority of the candidate")?;
    let begun = Instant::now();
    let settings = &job.settings;
    let Loaded {
        plugin,
        bytes,
        source,
    } = setup::load_admitted(host, settings, &job.sources, |id| is_for(job.seat, id))?;
    let id = plugin.id().clone();
    match &plugin {
        Plugin::Reward(reward) => vectors::check(reward, &job.row)?,
        Plugin::Formatter(formatter) => {
            let (rows, completions) = vectors::recent(&job.root)?;
            vectors::check_formatter(formatter, &job.row, (&rows, &completions))?;
        }
        Plugin::Curriculum(curriculum) => vectors::check_curriculum(curriculum, &job.next)?,
    }
    if Path::new(&source).exists() {
        keep_component(&job.root, &id, &bytes)?;
    }
    let milliseconds = begun.elapsed().as_secs_f64() * 1e3;
    drop(say.send(Message::Compiled { id, milliseconds }));
    let mut shadows = Shadows::default();
    for step in 1..=job.shadow {
        let tapped = steps.recv().context("the run ended")?;
        let report = shadows.add(&plugin, &tapped)?;
        if let ShadowReport::Reward(report) = &report
            && shadows.reward.fails(job.max_failure_rate)
        {
            let (failed, samples) = (report.failed, report.samples);
            return Err(SwapError::Fails { failed, samples }.into());
        }
        drop(say.send(Message::Shadowed { step, report }));
    }
    Ok((plugin, source))
}

/// Before its `configure`, which would not know what to do with another role's settings.
fn is_for(seat: Seat, id: &PluginId) -> anyhow::Result<()> {
    if id.role == seat.role {
        return Ok(());
    }
    let (name, role, wanted) = (id.name.clone(), id.role, seat.role);
    Err(SwapError::AnotherRole { name, role, wanted }.into())
}

/// One for each role; a candidate has one.
#[derive(Default)]
struct Shadows {
    reward: Shadow,
    texts: TextShadow,
    plans: PlanShadow,
}

impl Shadows {
    fn add(&mut self, plugin: &Plugin, step: &TappedStep) -> Result<ShadowReport, PluginError> {
        Ok(match plugin {
            Plugin::Reward(reward) => {
                self.reward.add(reward, &step.waves)?;
                ShadowReport::Reward(self.reward.report())
            }
            Plugin::Formatter(formatter) => {
                self.texts.add(formatter, &step.groups)?;
                ShadowReport::Formatter(self.texts.report())
            }
            Plugin::Curriculum(curriculum) => {
                self.plans.add(curriculum, &step.plans)?;
                ShadowReport::Curriculum(self.plans.report())
            }
        })
    }
}
