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
    shadow::{Shadow, ShadowReport, TappedWave},
    vectors,
};
use crate::{
    config::PluginConfig,
    error,
    plugin::{Plugin, PluginHost, RewardPlugin},
    run::keep_component,
    setup::{self, Loaded, PluginSources},
    types::PluginId,
};

/// How much nicer than the run its thread is. Of a core that the run wants too it gets a thirtieth, so that a step which waits for
/// all cores is hardly longer (10, a tenth, could be seen in the steps); at 19 it would get a hundredth, and large components would
/// not be compiled in time.
const NICENESS: i32 = 15;

/// What a candidate is to be.
pub(super) struct Job {
    pub(super) root: PathBuf,
    pub(super) sources: Arc<PluginSources>,
    pub(super) settings: PluginConfig,
    /// Steps to shadow.
    pub(super) shadow: u32,
    pub(super) max_failure_rate: f64,
    /// A row of the run as JSON, and its prompt or what may pass for one.
    pub(super) row: String,
    pub(super) prompt: String,
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
        reward: Box<RewardPlugin>,
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
    /// Takes the waves of a step.
    pub(super) steps: Sender<Vec<TappedWave>>,
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
                Ok((reward, source)) => Message::Ready {
                    reward: Box::new(reward),
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
    steps: &Receiver<Vec<TappedWave>>,
) -> anyhow::Result<(RewardPlugin, String)> {
    rustix::process::nice(NICENESS).context("cannot lower the priority of the candidate")?;
    let begun = Instant::now();
    let settings = &job.settings;
    let Loaded {
        plugin,
        bytes,
        source,
    } = setup::load_whole(host, settings, &job.sources)?;
    let reward = match plugin {
        Plugin::Reward(reward) => reward,
        other => {
            let role = format!("{:?}", other.id().role).to_lowercase();
            let name = other.id().name.clone();
            return Err(SwapError::NotAReward { name, role }.into());
        }
    };
    vectors::check(&reward, &job.row, &job.prompt)?;
    if Path::new(&source).exists() {
        keep_component(&job.root, reward.id(), &bytes)?;
    }
    let id = reward.id().clone();
    let milliseconds = begun.elapsed().as_secs_f64() * 1e3;
    drop(say.send(Message::Compiled { id, milliseconds }));
    let mut shadow = Shadow::default();
    for step in 1..=job.shadow {
        let waves = steps.recv().context("the run ended")?;
        shadow.add(&reward, &waves)?;
        let report = shadow.report();
        if shadow.fails(job.max_failure_rate) {
            let (failed, samples) = (report.failed, report.samples);
            return Err(SwapError::Fails { failed, samples }.into());
        }
        drop(say.send(Message::Shadowed { step, report }));
    }
    Ok((reward, source))
}
