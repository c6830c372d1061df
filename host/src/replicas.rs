//! The policy once on every GPU of the run (data parallelism): each replica has an engine and a draft of its own, and works on a
//! thread of its own while the others do. Prompts are divided among them in whole groups, sequences of an update by their tokens.
//!
//! Threads live as long as a call: a step makes three calls, and starting a thread takes microseconds. Threads that wait for
//! commands were rejected, since they can own what they work on only as copies, and outlive an error.
//!
//! What is done on one GPU and on several is the same but for rounding: completions are drawn by request and position, losses
//! are divided by what all replicas have together, and gradients are summed before they are clipped.

use std::{ops::Range, sync::mpsc, thread};

use anyhow::Context;
use grpo_policy::{
    backend::{AnyBackend, Exit, Group, cuda::Tenant},
    engine::{
        Engine, Progress,
        draft::{Draft, DraftFault},
    },
    error::PolicyError,
    tokenizer::Tokenizer,
    types::{Completion, Request},
    weights::LoadedModel,
};

use crate::placement::{Learning, Placed, Share};

/// A copy of the policy with what generates by it.
pub struct Replica {
    pub backend: AnyBackend,
    engine: Engine,
    draft: Option<Draft<AnyBackend>>,
    gpu: Option<Share>,
}

impl Replica {
    /// How the memory of its GPU is used; `None` on a CPU.
    pub(crate) fn share(&self) -> Option<&Share> {
        self.gpu.as_ref()
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    pub(crate) fn draft(&self) -> Option<&Draft<AnyBackend>> {
        self.draft.as_ref()
    }

    pub(crate) fn draft_mut(&mut self) -> Option<&mut Draft<AnyBackend>> {
        self.draft.as_mut()
    }

    /// What is distilled: a draft model, or an early exit of the policy.
    pub fn learning_draft(&mut self) -> Option<(&mut AnyBackend, Exit)> {
        self.draft.as_mut()?.learner_mut(&mut self.backend)
    }

    /// A draft model on the replica's device; it has no quantised matrices if it learns or runs on a CPU.
    ///
    /// # Errors
    /// As for the policy itself.
    pub(crate) fn place_draft(
        &self,
        model: &LoadedModel,
        learning: &Learning,
    ) -> Result<AnyBackend, PolicyError> {
        if let Some(share) = &self.gpu {
            return share.draft(model, learning);
        }
        let (spec, checkpointing) = (model.spec.clone(), learning.passes.gradient_checkpointing);
        AnyBackend::cpu(spec, &model.tensors, &learning.trainable, checkpointing)
    }

    /// Speculates with this draft from now on; nothing may have been generated yet.
    ///
    /// # Errors
    /// A GPU without room for the draft's keys and values.
    pub(crate) fn set_draft(&mut self, draft: Draft<AnyBackend>) -> Result<(), PolicyError> {
        let needs = draft.model().map(Tenant::of).unwrap_or_default();
        self.draft = Some(draft);
        if let Some(share) = &mut self.gpu {
            self.engine = Engine::new(share.divide_with_draft(needs)?)?;
        }
        Ok(())
    }

    /// Drops cached keys and values.
    pub(crate) fn forget_kv(&mut self) {
        self.engine.invalidate_prefix_cache();
    }

    fn generate(
        &mut self,
        tokenizer: &Tokenizer,
        requests: Vec<Request>,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<Vec<Completion>> {
        let draft = self.draft.as_mut();
        let completions =
            self.engine
                .generate(&mut self.backend, draft, tokenizer, requests, on_progress)?;
        Ok(completions)
    }
}

/// All replicas; at least one.
pub struct Replicas {
    first: Replica,
    others: Vec<Replica>,
    /// Who sums with whom: the policies, and drafts that learn.
    groups: Vec<Group>,
}

impl Drop for Replicas {
    /// While all devices are still there.
    fn drop(&mut self) {
        self.groups.iter().for_each(Group::abort);
    }
}

/// Tells the others when a replica's work ends without success, be it by a panic: they would wait for its gradients.
struct Alarm<'a> {
    groups: &'a [Group],
    armed: bool,
}

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.groups.iter().for_each(Group::abort);
        }
    }
}

/// Has a replica work on this thread.
fn run<T>(
    replica: &mut Replica,
    groups: &[Group],
    work: impl FnOnce(&mut Replica) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let armed = true;
    let mut alarm = Alarm { groups, armed };
    replica.backend.bind()?;
    let done = work(replica)?;
    alarm.armed = false;
    Ok(done)
}

/// What all have made, in their order; or what went wrong with the one that the others could not go on without.
fn all<T>(results: Vec<anyhow::Result<T>>) -> anyhow::Result<Vec<T>> {
    let is_cause = |error: &anyhow::Error| {
        let policy = error.downcast_ref::<PolicyError>();
        !matches!(policy, Some(PolicyError::RankFailed))
    };
    let several = results.len() > 1;
    let (mut made, mut errors) = (Vec::new(), Vec::new());
    for (rank, result) in results.into_iter().enumerate() {
        match result {
            Ok(value) => made.push(value),
            Err(error) => errors.push((rank, error)),
        }
    }
    let cause = errors.iter().position(|(_, error)| is_cause(error));
    let Some((rank, error)) = errors.into_iter().nth(cause.unwrap_or(0)) else {
        return Ok(made);
    };
    Err(match several {
        true => error.context(format!("replica {rank}")),
        false => error,
    })
}

impl Replicas {
    /// Has them sum their gradients if they train.
    ///
    /// # Errors
    /// Those of [`Group::join`] and of the engine's sizes.
    pub(crate) fn new(placed: Vec<Placed>, trains: bool) -> anyhow::Result<Self> {
        let replica = |placed: Placed| {
            Ok(Replica {
                backend: placed.backend,
                engine: Engine::new(placed.engine)?,
                draft: None,
                gpu: placed.gpu,
            })
        };
        let made: anyhow::Result<Vec<Replica>> = placed.into_iter().map(replica).collect();
        let mut made = made?.into_iter();
        let mut replicas = Self {
            first: made.next().context("a policy without a device")?,
            others: made.collect(),
            groups: Vec::new(),
        };
        if trains {
            let backends = replicas.iter_mut().map(|replica| &mut replica.backend);
            let group = join(backends.collect())?;
            replicas.groups.extend(group);
        }
        replicas.first.backend.bind()?;
        Ok(replicas)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        1 + self.others.len()
    }

    /// The one that files are written from.
    pub fn first(&self) -> &Replica {
        &self.first
    }

    pub fn first_mut(&mut self) -> &mut Replica {
        &mut self.first
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Replica> {
        std::iter::once(&self.first).chain(&self.others)
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Replica> {
        std::iter::once(&mut self.first).chain(&mut self.others)
    }

    /// Gives each replica its draft; `learns` has them sum gradients.
    ///
    /// # Errors
    /// Those of [`Replica::set_draft`] and [`Group::join`].
    pub(crate) fn set_drafts(
        &mut self,
        drafts: Vec<Draft<AnyBackend>>,
        learns: bool,
    ) -> Result<(), PolicyError> {
        for (replica, draft) in self.iter_mut().zip(drafts) {
            replica.set_draft(draft)?;
        }
        if learns {
            let models = self.iter_mut().filter_map(|replica| {
                let (model, exit) = replica.learning_draft()?;
                // An early exit sums with the policy that it is a part of.
                (exit == Exit::Final).then_some(model)
            });
            let group = join(models.collect())?;
            self.groups.extend(group);
        }
        self.first.backend.bind()
    }

    /// Has every replica work at the same time, the first one on this thread; `work` is told which it is. The results are in the
    /// order of the replicas.
    ///
    /// # Errors
    /// Whatever went wrong with one of them. Those who wait for its gradients are released; a model that trains on several
    /// devices cannot go on after that.
    pub fn each<T: Send>(
        &mut self,
        work: impl Fn(usize, &mut Replica) -> anyhow::Result<T> + Sync,
    ) -> anyhow::Result<Vec<T>> {
        let on_first = |replica: &mut Replica| work(0, replica);
        self.each_beside(on_first, &work)
    }

    /// The same with another kind of work for the first one.
    fn each_beside<T: Send>(
        &mut self,
        on_first: impl FnOnce(&mut Replica) -> anyhow::Result<T>,
        work: &(impl Fn(usize, &mut Replica) -> anyhow::Result<T> + Sync),
    ) -> anyhow::Result<Vec<T>> {
        let groups = self.groups.as_slice();
        let results = thread::scope(|scope| {
            let start = |(index, replica)| {
                scope.spawn(move || run(replica, groups, |replica| work(1 + index, replica)))
            };
            let others: Vec<_> = self.others.iter_mut().enumerate().map(start).collect();
            let mut results = vec![run(&mut self.first, groups, on_first)];
            let ended = others.into_iter().map(|other| match other.join() {
                Ok(result) => result,
                // The panic has said what it was.
                Err(_) => Err(anyhow::anyhow!("its thread ended with a panic")),
            });
            results.extend(ended);
            results
        });
        all(results)
    }

    /// Runs all requests to their end, a group on one replica. Completions come in the order of the requests,
    /// then by index; progress is that of whichever replica has made a step.
    pub(crate) fn generate(
        &mut self,
        tokenizer: &Tokenizer,
        requests: Vec<Request>,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<Vec<Completion>> {
        if self.others.is_empty() {
            return self.first.generate(tokenizer, requests, on_progress);
        }
        let weights: Vec<usize> = requests.iter().map(|r| r.n as usize).collect();
        let shares = divide(&weights, self.count());
        let share = |rank: usize| requests[shares[rank].clone()].to_vec();
        let (tell, told) = mpsc::channel();
        let completions = self.each_beside(
            |first| {
                let mut ours = |progress| {
                    on_progress(progress);
                    told.try_iter().for_each(&mut *on_progress);
                };
                first.generate(tokenizer, share(0), &mut ours)
            },
            &|rank, replica| {
                let mut theirs = |progress| {
                    // Nobody listens after the first one has failed.
                    _ = tell.send(progress);
                };
                replica.generate(tokenizer, share(rank), &mut theirs)
            },
        )?;
        self.give_up_together();
        Ok(completions.concat())
    }

    /// A draft that one replica has given up is given up by all: they learn together.
    fn give_up_together(&mut self) {
        let fault = self.iter().find_map(|replica| replica.draft()?.fault());
        if let Some(fault) = fault {
            self.give_up_drafts(fault);
        }
    }

    /// Goes on without drafts.
    pub(crate) fn give_up_drafts(&mut self, fault: DraftFault) {
        let drafts = self.iter_mut().filter_map(Replica::draft_mut);
        drafts.for_each(|draft| draft.give_up(fault));
    }
}

/// `None` for one alone.
fn join(mut backends: Vec<&mut AnyBackend>) -> Result<Option<Group>, PolicyError> {
    match backends.len() {
        0 | 1 => Ok(None),
        _ => Group::join(&mut backends).map(Some),
    }
}

/// Divides what weighs `weights` into `ranks` runs of about the same weight: a run ends where the sum so far is nearest to its part
/// of the whole. Neighbours stay together, so that the completions of a prompt are on one device, but for those at an end.
pub(crate) fn divide(weights: &[usize], ranks: usize) -> Vec<Range<usize>> {
    let mut sums = vec![0];
    sums.extend(weights.iter().scan(0, |sum, weight| {
        *sum += weight;
        Some(*sum)
    }));
    let whole = sums[weights.len()];
    let end = |rank: usize| {
        let wanted = whole * (rank + 1);
        let places = 0..=weights.len();
        places.min_by_key(|place| (sums[*place] * ranks).abs_diff(wanted))
    };
    let mut first = 0;
    let runs = (0..ranks).map(|rank| {
        let end = end(rank).filter(|_| rank + 1 < ranks);
        let end = end.unwrap_or(weights.len());
        std::mem::replace(&mut first, end)..end
    });
    runs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_everything() {
        assert_eq!(divide(&[3, 9, 1], 1), std::slice::from_ref(&(0..3)));
        assert_eq!(divide(&[], 2), [0..0, 0..0]);
    }

    #[test]
    fn runs_are_as_even_as_their_ends_allow() {
        assert_eq!(divide(&[4; 6], 3), [0..2, 2..4, 4..6]);
        assert_eq!(divide(&[100, 1, 1], 2), [0..1, 1..3]);
        // Half of 21 is nearest to 2 + 7 + 1.
        assert_eq!(divide(&[2, 7, 1, 3, 8], 2), [0..3, 3..5]);
        // One alone is at an end of its own.
        assert_eq!(divide(&[5], 3), [0..0, 0..1, 1..1]);
    }

    #[test]
    fn the_cause_is_told_and_not_those_who_waited_for_it() {
        let waited = || Err(PolicyError::RankFailed.into());
        let cause = PolicyError::Misuse("a gap");
        let error = all::<()>(vec![waited(), Ok(()), Err(cause.into()), waited()]).unwrap_err();
        assert_eq!(format!("{error:#}"), "replica 2: a gap");
        assert_eq!(all(vec![Ok(1), Ok(2)]).unwrap(), [1, 2]);
        let alone = all::<()>(vec![Err(PolicyError::Misuse("a gap").into())]).unwrap_err();
        assert_eq!(format!("{alone:#}"), "a gap");
    }
}
