//! Where the time of a training step goes. Off, it costs nothing; on, the host waits for the GPU at every change of what is
//! done, so that a step takes somewhat longer than without.

use std::{cell::RefCell, collections::BTreeMap, time::Instant};

use serde::Serialize;

use crate::backend::cuda::{CudaError, device::Gpu};

/// What a training step does, in the order of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Work {
    Forward(Kind),
    Backward(Kind),
    Optimizer,
    Merging,
}

/// A kind of kernel of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Embedding,
    Norms,
    Products,
    Rotation,
    Attention,
    Swiglu,
    Logits,
    Softmax,
    WeightGradients,
    Adapters,
}

impl Work {
    fn name(self) -> (&'static str, &'static str) {
        match self {
            Self::Forward(kind) => ("forward", kind.name()),
            Self::Backward(kind) => ("backward", kind.name()),
            Self::Optimizer => ("update", "optimizer"),
            Self::Merging => ("update", "merging"),
        }
    }
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Norms => "norms",
            Self::Products => "products",
            Self::Rotation => "rotation",
            Self::Attention => "attention",
            Self::Swiglu => "swiglu",
            Self::Logits => "logits",
            Self::Softmax => "softmax",
            Self::WeightGradients => "weight gradients",
            Self::Adapters => "adapters",
        }
    }
}

/// Time of one kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct WorkTime {
    /// `forward`, `backward` or `update`.
    pub phase: &'static str,
    pub work: &'static str,
    pub seconds: f64,
}

/// Sums by kind, and what is being done since when.
#[derive(Default)]
struct Running {
    sums: BTreeMap<Work, f64>,
    now: Option<(Work, Instant)>,
}

/// See the file header.
#[derive(Default)]
pub(super) struct Clock {
    running: RefCell<Option<Running>>,
    backward: bool,
}

impl Clock {
    /// Forgets what it has measured and begins anew.
    pub(super) fn start(&mut self) {
        self.running = RefCell::new(Some(Running::default()));
    }

    /// Whether passes from now on are backward ones.
    pub(super) fn turn(&mut self, backward: bool) {
        self.backward = backward;
    }

    /// From now on a pass does this.
    pub(super) fn enter(&self, gpu: &Gpu, kind: Kind) -> Result<(), CudaError> {
        self.change(
            gpu,
            match self.backward {
                true => Work::Backward(kind),
                false => Work::Forward(kind),
            },
        )
    }

    /// From now on this is done.
    pub(super) fn change(&self, gpu: &Gpu, work: Work) -> Result<(), CudaError> {
        if let Some(running) = self.running.borrow_mut().as_mut() {
            if running.now.is_some_and(|(now, _)| now == work) {
                return Ok(());
            }
            gpu.stream.synchronize()?;
            running.leave(Instant::now());
            running.now = Some((work, Instant::now()));
        }
        Ok(())
    }

    /// Nothing is done until the next change: the host is at work.
    pub(super) fn pause(&self, gpu: &Gpu) -> Result<(), CudaError> {
        if let Some(running) = self.running.borrow_mut().as_mut() {
            gpu.stream.synchronize()?;
            running.leave(Instant::now());
        }
        Ok(())
    }

    /// Ends measuring.
    pub(super) fn stop(&mut self) -> Vec<WorkTime> {
        let running = self.running.take().unwrap_or_default();
        let row = |(work, seconds): (&Work, &f64)| {
            let (phase, work) = work.name();
            WorkTime {
                phase,
                work,
                seconds: *seconds,
            }
        };
        running.sums.iter().map(row).collect()
    }
}

impl Running {
    fn leave(&mut self, at: Instant) {
        if let Some((work, since)) = self.now.take() {
            *self.sums.entry(work).or_default() += (at - since).as_secs_f64();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_add_up_by_what_was_done() {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut running = Running::default();
        for (work, from, to) in [
            (Work::Backward(Kind::Norms), 0, 3),
            (Work::Forward(Kind::Products), 3, 10),
            (Work::Backward(Kind::Norms), 12, 13),
        ] {
            running.now = Some((work, at(from)));
            running.leave(at(to));
        }
        running.leave(at(50));
        let mut clock = Clock {
            running: RefCell::new(Some(running)),
            ..Clock::default()
        };
        let times = clock.stop();
        let names: Vec<_> = times.iter().map(|t| (t.phase, t.work)).collect();
        assert_eq!(names, [("forward", "products"), ("backward", "norms")]);
        assert!((times[0].seconds - 0.007).abs() < 1e-9);
        assert!((times[1].seconds - 0.004).abs() < 1e-9);
        assert!(clock.stop().is_empty());
    }
}
