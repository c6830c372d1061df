//! Warm pools: instances of a plugin that serve request after request, for guests that start slowly.
//!
//! Only a plugin whose config asks for it has one. An instance leaves its pool with its first failure and after
//! `max_calls` requests; when all are busy, a request gets a fresh instance as it would without a pool.

use super::error::Fault;
use super::sandbox::Session;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Instances that all warm pools of an engine may hold together.
pub(super) const WARM_SLOTS: u32 = 8;

/// A plugin's warm pool, as the run's config says it. Every key has a default; an unknown key is an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Warm {
    /// Instances kept, 1 to 8; the pools of all plugins together have 8.
    pub size: u32,
    /// Requests after which an instance is replaced, 1 to 1 000 000. What a guest's allocator or collector
    /// does not give back is gone then.
    pub max_calls: u32,
}

impl Default for Warm {
    fn default() -> Self {
        Self {
            size: 1,
            max_calls: 1000,
        }
    }
}

impl Warm {
    /// Refuses values outside the ranges above.
    pub(super) fn check(&self) -> Result<(), Fault> {
        for (key, value, max) in [
            ("size", self.size, WARM_SLOTS),
            ("max_calls", self.max_calls, 1_000_000),
        ] {
            if !(1..=max).contains(&value) {
                return Err(Fault::WarmRange { key, value, max });
            }
        }
        Ok(())
    }
}

/// What the pools of an engine have taken of [`WARM_SLOTS`].
pub(super) type Taken = Arc<Mutex<u32>>;

/// The part of [`WARM_SLOTS`] that belongs to one plugin; given back when dropped.
pub(super) struct Share {
    warm: Warm,
    taken: Taken,
}

impl Share {
    /// Takes a plugin's part.
    ///
    /// # Errors
    /// Settings out of range, and pools that are too large together.
    pub(super) fn take(warm: Warm, taken: &Taken) -> Result<Self, Fault> {
        warm.check()?;
        let mut sum = lock(taken);
        let wanted = *sum + warm.size;
        if wanted > WARM_SLOTS {
            let limit = WARM_SLOTS;
            return Err(Fault::WarmSlots { wanted, limit });
        }
        *sum = wanted;
        Ok(Self {
            warm,
            taken: Arc::clone(taken),
        })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        *lock(&self.taken) -= self.warm.size;
    }
}

/// The warm instances of one plugin; `G` is its typed exports. Without a share it only makes fresh ones.
pub(super) struct Pool<G> {
    members: Mutex<Members<G>>,
    share: Option<Share>,
}

struct Members<G> {
    idle: Vec<Open<G>>,
    /// Those that are idle or at work.
    living: u32,
}

/// A configured instance.
pub(super) struct Open<G> {
    pub(super) session: Session,
    pub(super) guest: G,
    /// Requests it has served.
    served: u32,
}

/// An instance for one request. It goes back to its pool by [`Lease::keep`] only, and is dropped otherwise.
pub(super) struct Lease<'a, G> {
    // In this order: whoever is let in by the count needs the memory of the instance.
    open: Open<G>,
    place: Option<Place<'a, G>>,
}

/// Counts a member of a pool for as long as it lives at work.
struct Place<'a, G>(&'a Pool<G>);

impl<G> Drop for Place<'_, G> {
    fn drop(&mut self) {
        lock(&self.0.members).living -= 1;
    }
}

impl<G> Open<G> {
    pub(super) fn new(session: Session, guest: G) -> Self {
        Self {
            session,
            guest,
            served: 0,
        }
    }
}

impl<G> Pool<G> {
    pub(super) fn new(share: Option<Share>) -> Self {
        Self {
            members: Mutex::new(Members {
                idle: Vec::new(),
                living: 0,
            }),
            share,
        }
    }

    /// An idle instance, or one that `open` makes; it is told whether the new one belongs to the pool.
    ///
    /// # Errors
    /// Those of `open`.
    pub(super) fn lease<E>(
        &self,
        open: impl FnOnce(bool) -> Result<Open<G>, E>,
    ) -> Result<Lease<'_, G>, E> {
        let size = self.share.as_ref().map_or(0, |share| share.warm.size);
        let (idle, place) = {
            let mut members = lock(&self.members);
            let idle = members.idle.pop();
            let grows = idle.is_none() && members.living < size;
            members.living += u32::from(grows);
            let belongs = grows || idle.is_some();
            // `then_some` would make a place to throw away, whose drop waits for this lock.
            (idle, belongs.then(|| Place(self)))
        };
        let open = match idle {
            Some(open) => open,
            None => open(place.is_some())?,
        };
        Ok(Lease { open, place })
    }
}

impl<G> Lease<'_, G> {
    pub(super) fn open(&mut self) -> &mut Open<G> {
        &mut self.open
    }

    /// Puts the instance back after a request without a failure, unless it has served its time.
    pub(super) fn keep(mut self) {
        self.open.served += 1;
        self.put_back();
    }

    /// Puts the instance back without a request.
    pub(super) fn put_back(self) {
        let Self { open, place } = self;
        let Some(place) = place else {
            return;
        };
        let most = place
            .0
            .share
            .as_ref()
            .map_or(0, |share| share.warm.max_calls);
        if open.served < most {
            lock(&place.0.members).idle.push(open);
            // It still lives, and is counted.
            std::mem::forget(place);
        } else {
            drop(open);
        }
    }
}

/// Counts and lists here are valid at any moment, so a poisoned lock is as good as another.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
