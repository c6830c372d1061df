//! Memory of dropped matrices, kept for later ones of about the same size.
//!
//! A training pass makes and drops the same large matrices layer after layer. An allocator gives blocks of
//! that size back to the system, which clears every page before it lends it again: a fifth of a step of
//! SmolLM2-135M on two cores. Telling the allocator to keep them needs `unsafe` and would still write
//! zeros that a product overwrites.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

/// Smaller buffers (numbers, not bytes) are the allocator's, which is good at them.
const SMALLEST: usize = 1 << 16;
/// Numbers kept at most: 4 GiB.
const MOST_KEPT: usize = 1 << 30;

/// Free buffers by capacity. Shared, because a matrix may die on another worker than it was made on.
static FREE: Mutex<Free> = Mutex::new(Free {
    by_capacity: BTreeMap::new(),
    kept: 0,
});

struct Free {
    by_capacity: BTreeMap<usize, Vec<Vec<f32>>>,
    /// Sum of the capacities.
    kept: usize,
}

impl Free {
    /// The smallest buffer that fits and wastes at most a third.
    fn take(&mut self, len: usize) -> Option<Vec<f32>> {
        let (capacity, list) = self.by_capacity.range_mut(len..=len + len / 2).next()?;
        let (capacity, buffer) = (*capacity, list.pop());
        if list.is_empty() {
            self.by_capacity.remove(&capacity);
        }
        self.kept -= capacity;
        buffer
    }

    fn give(&mut self, buffer: Vec<f32>) {
        if self.kept + buffer.capacity() > MOST_KEPT {
            // Full of sizes that nobody asks for any more.
            self.by_capacity.clear();
            self.kept = 0;
        }
        self.kept += buffer.capacity();
        let list = self.by_capacity.entry(buffer.capacity()).or_default();
        list.push(buffer);
    }
}

/// `len` numbers of any value.
pub(super) fn take(len: usize) -> Vec<f32> {
    let found = if len < SMALLEST {
        None
    } else {
        // Every change of the list is complete or not begun, also after a panic elsewhere.
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        free.take(len)
    };
    let Some(mut buffer) = found else {
        return vec![0.0; len];
    };
    buffer.resize(len, 0.0);
    buffer
}

/// Takes a buffer back.
pub(super) fn give(buffer: Vec<f32>) {
    if buffer.capacity() >= SMALLEST {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        free.give(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free() -> Free {
        Free {
            by_capacity: BTreeMap::new(),
            kept: 0,
        }
    }

    #[test]
    fn the_tightest_fit_comes_back_and_a_loose_one_does_not() {
        let mut free = free();
        for size in [100, 160, 140] {
            free.give(Vec::with_capacity(size));
        }
        assert_eq!(free.take(120).map(|b| b.capacity()), Some(140));
        assert!(free.take(60).is_none(), "100 would waste too much");
        assert_eq!(free.kept, 260);
    }

    #[test]
    fn a_full_list_starts_again() {
        let mut free = free();
        free.give(Vec::with_capacity(10));
        free.kept = MOST_KEPT;
        free.give(Vec::with_capacity(20));
        assert_eq!(free.kept, 20);
        assert!(free.take(10).is_none());
    }

    #[test]
    fn lengths_are_as_asked() {
        give(vec![1.0; SMALLEST + 7]);
        assert_eq!(take(SMALLEST).len(), SMALLEST);
        assert_eq!(take(SMALLEST + 9).len(), SMALLEST + 9);
        assert_eq!(take(3), [0.0; 3]);
    }
}
