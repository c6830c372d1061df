//! What a pass is told about its tokens: one array of integers on the host, copied to the device in one go.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::{CudaError, siblings::Siblings};
use crate::backend::{BlockId, StepRow};

/// Query rows of a tensor-core tile (attention.cu).
const TILE_ROWS: usize = 16;

/// Where each array lies. `tokens`, `sequences` and `width` are the most there can be of tokens, sequences and
/// blocks of a sequence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) tokens: usize,
    pub(super) sequences: usize,
    pub(super) width: usize,
}

/// The arrays, in the order in which they lie.
#[derive(Clone, Copy, Debug)]
pub(super) enum Field {
    /// `[T]`: id, position (−1: padding) and sequence of each token.
    Ids,
    Positions,
    Sequences,
    /// `[tiles]`, see attention.cu.
    TileSequence,
    TileFirst,
    /// `[S]`, see attention.cu.
    QStart,
    QLen,
    KvLen,
    /// `[R]`: tokens whose hidden state is sampled from.
    Sampled,
    /// `[S]`: tokens to draw.
    Left,
    /// Counts the steps of a burst.
    Step,
    /// `[S, width]`; last, because only the rows in use are copied.
    Tables,
}

impl Layout {
    fn offset(&self, field: Field) -> usize {
        let (t, s) = (self.tokens, self.sequences);
        match field {
            Field::Ids => 0,
            Field::Positions => t,
            Field::Sequences => 2 * t,
            Field::TileSequence => 3 * t,
            Field::TileFirst => 4 * t,
            Field::QStart => 5 * t,
            Field::QLen => 5 * t + s,
            Field::KvLen => 5 * t + 2 * s,
            Field::Left => 5 * t + 3 * s,
            Field::Step => 5 * t + 4 * s,
            Field::Sampled => 5 * t + 4 * s + 1,
            Field::Tables => 6 * t + 4 * s + 1,
        }
    }

    fn len(&self) -> usize {
        self.offset(Field::Tables) + self.sequences * self.width
    }
}

/// See the file header.
pub(super) struct Inputs {
    layout: Layout,
    host: Vec<i32>,
    device: CudaSlice<i32>,
    base: u64,
}

/// A sequence of a burst that goes on in the next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Onward<'a> {
    /// Where it is in both.
    pub(super) slot: usize,
    /// Of the token that the device has drawn last.
    pub(super) position: usize,
    /// Tokens to draw.
    pub(super) left: usize,
    pub(super) blocks: &'a [BlockId],
}

/// How much of everything a pass has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) tokens: usize,
    pub(super) sequences: usize,
    pub(super) tiles: usize,
    pub(super) sampled: usize,
}

/// The shape of a pass in which all sequences have as many tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Uniform {
    pub(super) size: usize,
    pub(super) width: usize,
    /// Query heads that share a key head.
    pub(super) group: usize,
    pub(super) last_only: bool,
}

impl Inputs {
    /// Tokens there is room for.
    pub(super) fn tokens(&self) -> usize {
        self.layout.tokens
    }

    pub(super) fn new(stream: &Arc<CudaStream>, layout: Layout) -> Result<Self, CudaError> {
        let device = stream.alloc_zeros::<i32>(layout.len())?;
        let base = device.device_ptr(stream).0;
        Ok(Self {
            host: vec![0; layout.len()],
            layout,
            device,
            base,
        })
    }

    /// Device address of an array.
    pub(super) fn at(&self, field: Field) -> u64 {
        self.base + (self.layout.offset(field) * size_of::<i32>()) as u64
    }

    /// Blocks of a sequence there is room for.
    pub(super) fn width(&self) -> usize {
        self.layout.width
    }

    /// Lays the rows out and sends them; `pad` rows of one token follow. `group` query heads share a key head. With
    /// `siblings`, single tokens are in tiles of these.
    ///
    /// # Errors
    /// [`CudaError::Capacity`] for more than there is room for.
    pub(super) fn fill(
        &mut self,
        stream: &Arc<CudaStream>,
        rows: &[StepRow<'_>],
        pad: usize,
        group: usize,
        siblings: Option<&Siblings>,
    ) -> Result<Counts, CudaError> {
        let tokens: usize = rows.iter().map(|row| row.tokens.len()).sum();
        let blocks = rows.iter().map(|row| row.blocks.len()).max().unwrap_or(0);
        self.check(tokens + pad, rows.len() + pad, blocks)?;
        let mut n = Counts::default();
        for row in rows {
            self.add(row, (TILE_ROWS / group).max(1), &mut n);
        }
        for _ in 0..pad {
            self.add_padding(&mut n);
        }
        if let Some(siblings) = siblings {
            // Behind the last tile comes where it ends, as often as the graph has tiles.
            for tile in 0..=siblings.grid.tiles {
                let first = siblings.first.get(tile).copied().unwrap_or(rows.len());
                let shared = siblings.shared.get(tile).copied().unwrap_or(0);
                self.set(Field::TileSequence, tile, first as i32);
                self.set(Field::TileFirst, tile, shared as i32);
            }
        }
        self.set(Field::Step, 0, 0);
        self.send(stream, rows.len())?;
        Ok(n)
    }

    /// Sends what rows need to decode on behind what the device has drawn, by way of host memory: all but the tokens, which are
    /// on the device. Of `slots` sequences, those that are not in `rows` become padding.
    ///
    /// # Errors
    /// As [`Inputs::fill`].
    pub(super) fn refill(
        &mut self,
        stream: &Arc<CudaStream>,
        rows: &[Onward<'_>],
        slots: usize,
        by: &mut [i32],
    ) -> Result<(), CudaError> {
        let blocks = rows.iter().map(|on| on.blocks.len()).max().unwrap_or(0);
        self.check(slots, slots, blocks)?;
        for s in 0..slots {
            self.set(Field::Positions, s, -1);
            self.set(Field::KvLen, s, 0);
            self.set(Field::Left, s, 0);
        }
        for on in rows.iter().filter(|on| on.left > 0) {
            self.set(Field::Positions, on.slot, on.position as i32);
            self.set(Field::KvLen, on.slot, on.position as i32 + 1);
            self.set(Field::Left, on.slot, on.left as i32);
            for (i, block) in on.blocks.iter().enumerate() {
                self.set(
                    Field::Tables,
                    on.slot * self.layout.width + i,
                    *block as i32,
                );
            }
        }
        self.set(Field::Step, 0, 0);
        let first = self.layout.offset(Field::Positions);
        let used = self.layout.offset(Field::Tables) + slots * self.layout.width;
        let by = &mut by[..used - first];
        by.copy_from_slice(&self.host[first..used]);
        Ok(stream.memcpy_htod(&*by, &mut self.device.slice_mut(first..used))?)
    }

    /// Integers that [`Inputs::refill`] sends, at most.
    pub(super) fn more(&self) -> usize {
        self.layout.len() - self.layout.offset(Field::Positions)
    }

    /// [`Inputs::fill`] for `size` sequences of `width` tokens each, the shape a captured graph has: what a row lacks is padding,
    /// and so are the sequences beyond the rows. Sampled from: every token, or each row's last.
    ///
    /// # Errors
    /// As [`Inputs::fill`].
    pub(super) fn fill_uniform(
        &mut self,
        stream: &Arc<CudaStream>,
        rows: &[StepRow<'_>],
        shape: &Uniform,
    ) -> Result<Counts, CudaError> {
        let tokens = shape.size * shape.width;
        let blocks = rows.iter().map(|row| row.blocks.len()).max().unwrap_or(0);
        self.check(tokens, shape.size, blocks)?;
        let mut n = Counts {
            tokens,
            sequences: shape.size,
            ..Counts::default()
        };
        for s in 0..shape.size {
            self.add_uniform(s, rows.get(s), shape, &mut n);
        }
        self.set(Field::Step, 0, 0);
        self.send(stream, rows.len())?;
        Ok(n)
    }

    fn add_uniform(
        &mut self,
        s: usize,
        row: Option<&StepRow<'_>>,
        shape: &Uniform,
        n: &mut Counts,
    ) {
        let (start, len) = (s * shape.width, row.map_or(0, |row| row.tokens.len()));
        let cached = row.map_or(0, |row| row.position);
        self.set(Field::QStart, s, start as i32);
        self.set(Field::QLen, s, len.max(1) as i32);
        self.set(Field::KvLen, s, (cached + len) as i32);
        self.set(Field::Left, s, 0);
        for (i, block) in row.iter().flat_map(|row| row.blocks).enumerate() {
            self.set(Field::Tables, s * self.layout.width + i, *block as i32);
        }
        for i in 0..shape.width {
            let id = row.and_then(|row| row.tokens.get(i));
            let position = id.map_or(-1, |_| (cached + i) as i32);
            self.set(Field::Ids, start + i, id.map_or(0, |id| *id as i32));
            self.set(Field::Positions, start + i, position);
            self.set(Field::Sequences, start + i, s as i32);
        }
        // A tile behind the last token of its row has no query and writes nothing.
        for first in (0..shape.width).step_by((TILE_ROWS / shape.group).max(1)) {
            self.set(Field::TileSequence, n.tiles, s as i32);
            self.set(Field::TileFirst, n.tiles, first as i32);
            n.tiles += 1;
        }
        let sampled = match shape.last_only {
            true => start + len.max(1) - 1..start + len.max(1),
            false => start..start + shape.width,
        };
        for token in sampled {
            self.set(Field::Sampled, n.sampled, token as i32);
            n.sampled += 1;
        }
    }

    fn check(&self, tokens: usize, sequences: usize, blocks: usize) -> Result<(), CudaError> {
        for (what, asked, most) in [
            ("tokens", tokens, self.layout.tokens),
            ("sequences", sequences, self.layout.sequences),
            ("KV blocks of a sequence", blocks, self.layout.width),
        ] {
            if asked > most {
                return Err(CudaError::Capacity { what, asked, most });
            }
        }
        Ok(())
    }

    /// Sends everything, with the block tables of the first `rows` sequences.
    fn send(&mut self, stream: &Arc<CudaStream>, rows: usize) -> Result<(), CudaError> {
        let used = self.layout.offset(Field::Tables) + rows * self.layout.width;
        Ok(stream.memcpy_htod(&self.host[..used], &mut self.device.slice_mut(..used))?)
    }

    fn set(&mut self, field: Field, index: usize, value: i32) {
        self.host[self.layout.offset(field) + index] = value;
    }

    fn add(&mut self, row: &StepRow<'_>, per_tile: usize, n: &mut Counts) {
        let (s, len, start) = (n.sequences, row.tokens.len(), n.tokens);
        self.set(Field::QStart, s, start as i32);
        self.set(Field::QLen, s, len as i32);
        self.set(Field::KvLen, s, (row.position + len) as i32);
        for (i, block) in row.blocks.iter().enumerate() {
            self.set(Field::Tables, s * self.layout.width + i, *block as i32);
        }
        for (i, id) in row.tokens.iter().enumerate() {
            self.set(Field::Ids, start + i, *id as i32);
            self.set(Field::Positions, start + i, (row.position + i) as i32);
            self.set(Field::Sequences, start + i, s as i32);
        }
        for first in (0..len).step_by(per_tile) {
            self.set(Field::TileSequence, n.tiles, s as i32);
            self.set(Field::TileFirst, n.tiles, first as i32);
            n.tiles += 1;
        }
        n.tokens += len;
        n.sequences += 1;
        if let Some(args) = &row.sample {
            self.set(Field::Left, s, args.ahead as i32 + 1);
            let proposed = args.proposal.map_or(0, |p| p.tokens.len());
            for token in n.tokens - 1 - proposed..n.tokens {
                self.set(Field::Sampled, n.sampled, token as i32);
                n.sampled += 1;
            }
        }
    }

    /// A row that writes no key and sees none.
    fn add_padding(&mut self, n: &mut Counts) {
        let (s, token) = (n.sequences, n.tokens);
        for (field, value) in [
            (Field::QStart, token as i32),
            (Field::QLen, 1),
            (Field::KvLen, 0),
            (Field::Left, 0),
        ] {
            self.set(field, s, value);
        }
        self.set(Field::Ids, token, 0);
        self.set(Field::Positions, token, -1);
        self.set(Field::Sequences, token, s as i32);
        self.set(Field::TileSequence, n.tiles, s as i32);
        self.set(Field::TileFirst, n.tiles, 0);
        self.set(Field::Sampled, n.sampled, token as i32);
        n.tokens += 1;
        n.sequences += 1;
        n.tiles += 1;
        n.sampled += 1;
    }
}
