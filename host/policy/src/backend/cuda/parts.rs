//! The parts of a pass by name, and a filter that queues one of them alone, so that it can be timed (graph/profile.rs).

use std::cell::Cell;

/// What a kernel of a pass is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Embed,
    /// A norm that is a kernel of its own.
    Norm,
    Qkv,
    /// Heads rotated and written to the cache, where attention does not do it.
    Rope,
    Attention,
    O,
    /// With SwiGLU, where that is not a kernel of its own.
    GateUp,
    Swiglu,
    Down,
    Head,
    Sampling,
    Advance,
}

impl Part {
    /// In the order of the variants.
    pub(super) const ALL: [Self; 12] = [
        Self::Embed,
        Self::Norm,
        Self::Qkv,
        Self::Rope,
        Self::Attention,
        Self::O,
        Self::GateUp,
        Self::Swiglu,
        Self::Down,
        Self::Head,
        Self::Sampling,
        Self::Advance,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Norm => "norm",
            Self::Qkv => "qkv",
            Self::Rope => "rope",
            Self::Attention => "attention",
            Self::O => "o",
            Self::GateUp => "gate_up",
            Self::Swiglu => "swiglu",
            Self::Down => "down",
            Self::Head => "head",
            Self::Sampling => "sampling",
            Self::Advance => "advance",
        }
    }
}

/// See the file header. A kernel belongs to the part that was entered last.
#[derive(Debug, Default)]
pub(super) struct Filter {
    entered: Cell<Option<Part>>,
    only: Cell<Option<Part>>,
    queued: Cell<[usize; Part::ALL.len()]>,
}

impl Filter {
    pub(super) fn enter(&self, part: Part) {
        self.entered.set(Some(part));
    }

    /// From now on only kernels of `part` are queued; all of them with `None`.
    pub(super) fn keep(&self, part: Option<Part>) {
        self.only.set(part);
    }

    /// Whether the next kernel is queued; it is counted if so.
    pub(super) fn admits(&self) -> bool {
        let entered = self.entered.get();
        if self.only.get().is_some_and(|only| entered != Some(only)) {
            return false;
        }
        if let Some(part) = entered {
            let mut queued = self.queued.get();
            queued[part as usize] += 1;
            self.queued.set(queued);
        }
        true
    }

    /// Kernels of each part since the last call, in the order of [`Part::ALL`].
    pub(super) fn take_queued(&self) -> [usize; Part::ALL.len()] {
        self.queued.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_part_alone_is_queued_and_counted() {
        let filter = Filter::default();
        let pass = || {
            [Part::Embed, Part::Qkv, Part::Qkv, Part::Head].map(|part| {
                filter.enter(part);
                filter.admits()
            })
        };
        assert_eq!(pass(), [true; 4]);
        let mut expected = [0; Part::ALL.len()];
        for (part, count) in [(Part::Embed, 1), (Part::Qkv, 2), (Part::Head, 1)] {
            expected[part as usize] = count;
        }
        assert_eq!(filter.take_queued(), expected);
        filter.keep(Some(Part::Qkv));
        assert_eq!(pass(), [false, true, true, false]);
        filter.keep(None);
        assert_eq!(pass(), [true; 4]);
        assert_eq!(filter.take_queued()[Part::Qkv as usize], 4);
    }

    #[test]
    fn parts_lie_in_the_order_of_their_numbers() {
        for (i, part) in Part::ALL.iter().enumerate() {
            assert_eq!(*part as usize, i, "{part:?}");
        }
    }
}
