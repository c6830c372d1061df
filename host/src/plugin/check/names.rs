//! The names a plugin has given its numbers so far. Every name is a series in metrics and report, so one
//! that invents a name at each call would make them grow without end.

use super::Fault;
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

/// Different names of one plugin in one process.
const MAX_DISTINCT: usize = 256;

/// Names seen, over all calls.
#[derive(Default)]
pub(in super::super) struct Names(Mutex<BTreeSet<String>>);

impl Names {
    /// Takes note of the names of one result.
    ///
    /// # Errors
    /// [`Fault::Size`] for the first name beyond [`MAX_DISTINCT`]; names known already stay usable.
    pub(in super::super) fn admit(&self, numbers: &[(String, f64)]) -> Result<(), Fault> {
        if numbers.is_empty() {
            return Ok(());
        }
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, _) in numbers {
            if seen.contains(name) {
                continue;
            }
            if seen.len() == MAX_DISTINCT {
                return Err(Fault::Size {
                    what: "different names of parts or metrics in all",
                    found: MAX_DISTINCT as u64 + 1,
                    limit: MAX_DISTINCT as u64,
                });
            }
            seen.insert(name.clone());
        }
        Ok(())
    }
}
