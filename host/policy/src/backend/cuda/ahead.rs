//! Bursts of plain decoding, one ahead of the host: while it looks at what one has drawn, the next is running on the same
//! sequences, from the tokens that are still on the device. What it draws for a sequence that turns out to have ended is
//! thrown away, and its place stays empty in the bursts behind; all of it is when the host comes with something else.
//!
//! The blocks of a sequence that has ended may have a new owner while the burst still writes to them. That is harmless:
//! everything is on one stream, so the new owner writes later.

use std::{collections::HashMap, sync::Arc};

use cudarc::driver::{CudaEvent, CudaStream, PinnedHostSlice};

use super::{
    CudaBackend, CudaError,
    graph::{Captured, Chances, Decode, Drawn, MAX_BURST, bucket},
    inputs::Onward,
    step::Sampling,
};
use crate::{
    backend::{Sampled, StepRow},
    error::PolicyError,
};

/// Host memory of a burst. The device reads and writes it by itself; a copy from memory that the system may move waits for all
/// that runs, and the GPU would have nothing to do meanwhile.
struct Landing {
    /// Where what is drawn arrives, `[steps, rows]`.
    token: PinnedHostSlice<i32>,
    logprob: PinnedHostSlice<f32>,
    /// From where it is sent what a burst needs behind another: `[rows]`, `[steps, rows]`, and [`Decode::more`].
    temperature: PinnedHostSlice<f32>,
    uniform: PinnedHostSlice<f64>,
    more: PinnedHostSlice<i32>,
    /// Behind all copies: the slices' own events are off, like all event tracking.
    arrived: CudaEvent,
}

impl Landing {
    fn new(stream: &Arc<CudaStream>, decode: &Decode) -> Result<Self, CudaError> {
        let (context, rows) = (stream.context(), decode.rows());
        let cells = MAX_BURST * rows;
        // SAFETY: the first two are not read before a copy has filled what is read, the others are filled here.
        let mut landing = unsafe {
            Self {
                token: context.alloc_pinned_with_flags(cells, 0)?,
                logprob: context.alloc_pinned_with_flags(cells, 0)?,
                temperature: context.alloc_pinned_with_flags(rows, 0)?,
                uniform: context.alloc_pinned_with_flags(cells, 0)?,
                more: context.alloc_pinned_with_flags(decode.more(), 0)?,
                arrived: context.new_event(None)?,
            }
        };
        landing.temperature.as_mut_slice()?.fill(1.0);
        landing.uniform.as_mut_slice()?.fill(0.0);
        landing.more.as_mut_slice()?.fill(0);
        Ok(landing)
    }
}

/// A sequence of a burst.
struct Flying {
    sequence: u64,
    /// Of the first token drawn.
    position: u64,
    drawn: usize,
    /// It can go on behind the burst.
    live: bool,
}

/// A burst that is running.
struct Burst {
    rows: Vec<Flying>,
    /// The graph of its steps.
    key: Captured,
    landing: usize,
}

/// See the file header.
pub(super) struct Ahead {
    landings: [Landing; 2],
    /// The one to use next.
    free: usize,
    flying: Option<Burst>,
}

impl Ahead {
    pub(super) fn new(stream: &Arc<CudaStream>, decode: &Decode) -> Result<Self, CudaError> {
        let landing = || Landing::new(stream, decode);
        Ok(Self {
            landings: [landing()?, landing()?],
            free: 0,
            flying: None,
        })
    }

    /// Forgets what is running.
    pub(super) fn forget(&mut self) {
        self.flying = None;
    }
}

/// Tokens that a row may have from its position on.
fn allowed(row: &StepRow<'_>) -> usize {
    row.sample.as_ref().map_or(0, |args| args.ahead + 1)
}

impl Burst {
    /// Where each row is in it. A row that the burst has not continued from where it stands is in none.
    fn places(&self, rows: &[StepRow<'_>]) -> Vec<Option<usize>> {
        let by_sequence: HashMap<u64, usize> = (0..self.rows.len())
            .map(|i| (self.rows[i].sequence, i))
            .collect();
        let place = |row: &StepRow<'_>| {
            let args = row.sample.as_ref()?;
            let i = *by_sequence.get(&row.sequence)?;
            let same = self.rows[i].position == args.position && self.rows[i].drawn > 0;
            (same && row.tokens.len() == 1 && args.proposal.is_none()).then_some(i)
        };
        rows.iter().map(place).collect()
    }
}

impl CudaBackend {
    /// See [`crate::backend::Backend::step`].
    pub(super) fn next_step(
        &mut self,
        rows: &[StepRow<'_>],
    ) -> Result<Vec<Vec<Sampled>>, PolicyError> {
        let Some(burst) = self.ahead.flying.take() else {
            return self.step_anew(rows);
        };
        let places = burst.places(rows);
        if places.iter().all(Option::is_none) {
            return self.step_anew(rows);
        }
        if let Some(slots) = places.iter().copied().collect::<Option<Vec<_>>>()
            && rows.len() * 8 >= burst.rows.len() * 7
        {
            self.ahead.flying = self.follow(&burst, &slots, rows)?;
        }
        let mut out = self.land(&burst, &places, rows)?;
        // The others take one step, and from then on all go together again.
        let others = || (0..rows.len()).filter(|i| places[*i].is_none());
        let mut rest: Vec<StepRow<'_>> = others().map(|i| rows[i].clone()).collect();
        for args in rest.iter_mut().filter_map(|row| row.sample.as_mut()) {
            args.ahead = 0;
        }
        if !rest.is_empty() {
            for (i, sampled) in others().zip(self.step_anew(&rest)?) {
                out[i] = sampled;
            }
        }
        Ok(out)
    }

    /// Draws up to `ahead + 1` tokens for every row from its whole distribution.
    pub(super) fn burst(&mut self, rows: &[StepRow<'_>]) -> Result<Vec<Vec<Sampled>>, PolicyError> {
        let steps = rows.iter().map(allowed).max().unwrap_or(1).min(MAX_BURST);
        let args: Vec<_> = rows.iter().filter_map(|row| row.sample.as_ref()).collect();
        let size = bucket(rows.len(), self.decode.rows());
        let siblings = self.siblings(rows);
        let key = self.captured(size, rows, Sampling::Plain, siblings.as_ref())?;
        self.decode.send_randomness(&self.gpu, &args, steps)?;
        let group = self.group();
        self.decode
            .send_rows(&self.gpu, rows, size - rows.len(), group, siblings.as_ref())?;
        let flying = rows.iter().zip(&args).map(|(row, args)| Flying {
            sequence: row.sequence,
            position: args.position,
            drawn: (args.ahead + 1).min(steps),
            live: args.ahead + 1 > steps,
        });
        let flying = flying.collect();
        let burst = self.fly(flying, key, steps)?;
        let slots: Vec<usize> = (0..rows.len()).collect();
        self.ahead.flying = self.follow(&burst, &slots, rows)?;
        let places: Vec<_> = slots.into_iter().map(Some).collect();
        self.land(&burst, &places, rows)
    }

    /// Starts the burst behind one that is running, for rows that are in it at `slots`. The places of those that have ended stay
    /// empty: putting the others together again takes a burst that waits for the host.
    fn follow(
        &mut self,
        burst: &Burst,
        slots: &[usize],
        rows: &[StepRow<'_>],
    ) -> Result<Option<Burst>, PolicyError> {
        let onward = |(slot, row): (&usize, &StepRow<'_>)| {
            let flying = &burst.rows[*slot];
            allowed(row).saturating_sub(flying.drawn) * usize::from(flying.live)
        };
        let left: Vec<usize> = slots.iter().zip(rows).map(onward).collect();
        let steps = left.iter().copied().max().unwrap_or(0).min(MAX_BURST);
        if steps == 0 {
            return Ok(None);
        }
        let (mut onward, mut chances) = (Vec::new(), Vec::new());
        let next = |flying: &Flying| Flying {
            sequence: flying.sequence,
            position: flying.position + flying.drawn as u64,
            drawn: 0,
            live: false,
        };
        let mut next: Vec<Flying> = burst.rows.iter().map(next).collect();
        for ((row, slot), left) in rows.iter().zip(slots).zip(left) {
            let (slot, skipped) = (*slot, burst.rows[*slot].drawn);
            let position = row.position + skipped;
            onward.push(Onward {
                slot,
                position,
                left,
                blocks: row.blocks,
            });
            chances.extend(row.sample.as_ref().map(|args| Chances {
                slot,
                args,
                skipped,
            }));
            next[slot].drawn = left.min(steps);
            next[slot].live = left > steps;
        }
        let from = &mut self.ahead.landings[self.ahead.free];
        // The burst before the last may not have read what it was sent: nobody has waited for one that was dropped.
        from.arrived.synchronize().map_err(CudaError::from)?;
        let temperature = from.temperature.as_mut_slice().map_err(CudaError::from)?;
        let uniform = from.uniform.as_mut_slice().map_err(CudaError::from)?;
        let more = from.more.as_mut_slice().map_err(CudaError::from)?;
        self.decode
            .send_randomness_by(&self.gpu, &chances, steps, (temperature, uniform))?;
        self.decode
            .send_more(&self.gpu, &onward, burst.rows.len(), more)?;
        Ok(Some(self.fly(next, burst.key, steps)?))
    }

    /// Queues the steps, and the way of what they draw to the host.
    fn fly(&mut self, rows: Vec<Flying>, key: Captured, steps: usize) -> Result<Burst, CudaError> {
        for _ in 0..steps {
            self.graphs[&key].launch()?;
        }
        let landing = self.ahead.free;
        self.ahead.free = 1 - landing;
        let to = &mut self.ahead.landings[landing];
        self.decode
            .send_home(&self.gpu, steps, &mut to.token, &mut to.logprob)?;
        to.arrived.record(&self.gpu.stream)?;
        Ok(Burst { rows, key, landing })
    }

    /// Waits for a burst and takes what it drew for the rows at these places; nothing for the others.
    fn land(
        &mut self,
        burst: &Burst,
        places: &[Option<usize>],
        rows: &[StepRow<'_>],
    ) -> Result<Vec<Vec<Sampled>>, PolicyError> {
        let landing = &self.ahead.landings[burst.landing];
        landing.arrived.synchronize().map_err(CudaError::from)?;
        let drawn = Drawn {
            token: landing.token.as_slice().map_err(CudaError::from)?,
            logprob: landing.logprob.as_slice().map_err(CudaError::from)?,
            stride: self.decode.rows(),
        };
        let of_place = |(place, row): (&Option<usize>, &StepRow<'_>)| {
            let Some(i) = *place else {
                return Ok(Vec::new());
            };
            let flying = &burst.rows[i];
            // It may have been allowed more then than now.
            (0..flying.drawn.min(allowed(row)))
                .map(|step| drawn.get(step, i, flying.position as usize + step))
                .collect()
        };
        places.iter().zip(rows).map(of_place).collect()
    }
}
