//! Which sequences of a decoding step read the blocks of a prompt together (group.cu).

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaModule, sys::CUdevice_attribute as Attribute};

use super::{
    BLOCK_SIZE, CudaError,
    device::{AttentionKernel, Gpu, roomy},
    launch::{Attention, Launch, Projection},
};
use crate::{backend::StepRow, spec::ModelSpec};

/// Warps of a block of group.cu.
const WARPS: usize = 8;

/// Query heads and tokens that a tensor-core tile has room for.
const TILE_ROWS: usize = 16;

/// Sequences below which nothing is gained: a block of threads for each of them is what fills the GPU.
const FEWEST: usize = 32;

/// Shared blocks from which reading them together is faster, for up to so many query heads a key head. Measured on an H200 with
/// 8 completions a prompt: with few heads a tile has room for many sequences, with more it takes longer prompts.
const WORTH: [(usize, usize); 2] = [(3, 8), (usize::MAX, 32)];

/// What a captured graph is launched with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Grid {
    /// Sequences of a tile, at most: 2, 4 or 8.
    pub(super) members: usize,
    pub(super) tiles: usize,
}

/// The tiles of a step; see [`Grid`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Siblings {
    pub(super) grid: Grid,
    /// First sequence of each tile.
    pub(super) first: Vec<usize>,
    /// Blocks that all of the tile share.
    pub(super) shared: Vec<usize>,
}

/// Tiles of rows that a kernel has for heads of this size.
fn row_tiles(head_dim: usize) -> &'static [usize] {
    match head_dim {
        32 | 64 => &[1, 2, 4],
        _ => &[1],
    }
}

impl Siblings {
    /// Neighbours that begin with the same blocks, where reading these together is faster than one by one.
    pub(super) fn of(rows: &[StepRow<'_>], spec: &ModelSpec, processors: usize) -> Option<Self> {
        let group = spec.num_attention_heads / spec.num_key_value_heads;
        let most = row_tiles(spec.head_dim).last()? * TILE_ROWS;
        let fits = |members: &&usize| **members * group <= most;
        let one_wave =
            |members: &&usize| rows.len() * spec.num_key_value_heads <= **members * processors;
        let choices = || [2, 4, 8].iter().filter(fits);
        let members = *choices().find(one_wave).or(choices().next_back())?;
        let tiles = tiles(rows, members);
        let (_, worth) = WORTH.iter().find(|(heads, _)| group <= *heads)?;
        let read: usize = tiles.iter().map(|(_, shared)| shared).sum();
        if rows.len() < FEWEST || read < worth * tiles.len() || 4 * tiles.len() > 3 * rows.len() {
            return None;
        }
        let (first, shared): (Vec<_>, Vec<_>) = tiles.into_iter().unzip();
        Some(Self {
            grid: Grid {
                members,
                tiles: first.len().next_multiple_of(8).min(rows.len() - 1),
            },
            first,
            shared,
        })
    }
}

/// First row of each tile of up to `members` neighbours, and the blocks that they share.
fn tiles(rows: &[StepRow<'_>], members: usize) -> Vec<(usize, usize)> {
    let mut tiles: Vec<(usize, usize)> = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        // The block that a token is written to is its sequence's own.
        let readable = row.position / BLOCK_SIZE;
        if let Some((first, shared)) = tiles.last_mut()
            && i - *first < members
        {
            let pairs = rows[*first].blocks.iter().zip(row.blocks);
            let alike = pairs.take(readable).take_while(|(a, b)| a == b).count();
            if alike > 0 && *shared > 0 {
                *shared = alike.min(*shared);
                continue;
            }
        }
        tiles.push((i, readable));
    }
    tiles
}

/// The kernels of group.cu for one size of head, by their tiles of rows; only those whose blocks the GPU has memory for.
pub(super) struct GroupKernels(Vec<(usize, AttentionKernel)>);

impl GroupKernels {
    pub(super) fn load(
        context: &Arc<CudaContext>,
        modules: &[Arc<CudaModule>],
        head_dim: usize,
    ) -> Result<Self, CudaError> {
        let room = context
            .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
            as usize;
        let mut kernels = Vec::new();
        for &tiles in row_tiles(head_dim) {
            let sums = WARPS * (1 + tiles) * TILE_ROWS * (head_dim + 2) * size_of::<f32>();
            let heads = (TILE_ROWS * tiles + 2 * WARPS) * head_dim * size_of::<u16>();
            // Beside them the kernel has some numbers of each member.
            if sums + heads + 1024 > room {
                break;
            }
            let function = roomy(
                modules,
                &format!("decode_group_{head_dim}_{tiles}"),
                sums + heads,
            )?;
            kernels.push((
                tiles,
                AttentionKernel {
                    function,
                    threads: 32 * WARPS as u32,
                    shared: sums + heads,
                },
            ));
        }
        Ok(Self(kernels))
    }

    /// The one for so many rows.
    fn of(&self, rows: usize) -> Option<&AttentionKernel> {
        let fits = |(tiles, _): &&(usize, AttentionKernel)| tiles * TILE_ROWS >= rows;
        self.0.iter().find(fits).map(|(_, kernel)| kernel)
    }

    /// Whether there is one for tiles of this grid.
    pub(super) fn serves(&self, grid: Grid, group: usize) -> bool {
        self.of(grid.members * group).is_some()
    }
}

impl Gpu {
    /// Sequences of one token, straight from the projection, tile by tile.
    pub(super) fn decode_group(
        &self,
        args: &Attention,
        from: &Projection,
        grid: Grid,
    ) -> Result<(), CudaError> {
        let rows = grid.members * (args.q_heads / args.kv_heads) as usize;
        let kernel = self.kernels.decode_group.of(rows);
        let kernel = kernel.ok_or(CudaError::NotYet("a tile of so many heads"))?;
        let members = grid.members as i32;
        let launch = Launch {
            grid: (grid.tiles, args.kv_heads as usize, 1),
            shared: kernel.shared,
            ..Launch::of(1, kernel.threads)
        };
        let arguments = [
            std::ptr::from_ref(args).cast_mut().cast(),
            std::ptr::from_ref(from).cast_mut().cast(),
            (&raw const members).cast_mut().cast(),
        ];
        self.queue(&kernel.function, launch, &arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Family;

    fn spec(heads: usize, key_heads: usize, head_dim: usize) -> ModelSpec {
        ModelSpec {
            family: Family::Qwen2,
            vocab_size: 100,
            hidden_size: 64,
            intermediate_size: 64,
            num_hidden_layers: 1,
            num_attention_heads: heads,
            num_key_value_heads: key_heads,
            head_dim,
            max_position_embeddings: 1 << 20,
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            rope_scaling: None,
            tie_word_embeddings: true,
            qkv_bias: true,
            o_bias: false,
            qk_norm: false,
        }
    }

    /// Block tables of `prompts` groups of `n`, of `shared` blocks and three of each one's own.
    fn tables(prompts: u32, n: u32, shared: u32) -> Vec<Vec<u32>> {
        let of = |i: u32| {
            let prompt = (0..shared).map(move |b| 10_000 * (i / n) + b);
            prompt.chain((0..3).map(move |b| 5_000_000 + 3 * i + b))
        };
        (0..prompts * n).map(|i| of(i).collect()).collect()
    }

    fn rows(tables: &[Vec<u32>], position: usize) -> Vec<StepRow<'_>> {
        tables
            .iter()
            .enumerate()
            .map(|(i, blocks)| StepRow {
                sequence: i as u64,
                tokens: &[1],
                position,
                blocks,
                sample: None,
            })
            .collect()
    }

    #[test]
    fn neighbours_with_the_same_blocks_are_a_tile() {
        let mut tables = tables(2, 5, 4);
        let all = tiles(&rows(&tables, 4 * BLOCK_SIZE), 4);
        assert_eq!(all, [(0, 4), (4, 4), (5, 4), (9, 4)]);
        // The block that is written to is never shared, and one that parts early shares less.
        tables[2][1] = 77;
        let all = tiles(&rows(&tables, 3 * BLOCK_SIZE + 5), 4);
        assert_eq!(all, [(0, 1), (4, 3), (5, 3), (9, 3)]);
        let all = tiles(&rows(&tables, 5), 4);
        assert_eq!(all.len(), 10);
    }

    #[test]
    fn they_are_read_together_where_it_is_worth_it() {
        let of = |prompts, n, shared, spec: &ModelSpec| {
            let tables = tables(prompts, n, shared);
            let rows = rows(&tables, shared as usize * BLOCK_SIZE + 1);
            Siblings::of(&rows, spec, 132).map(|s| (s.grid.members, s.grid.tiles))
        };
        let half = spec(14, 2, 64);
        assert_eq!(of(8, 8, 32, &half), Some((2, 32)));
        assert_eq!(of(32, 8, 40, &half), Some((4, 64)));
        assert_eq!(of(64, 8, 40, &half), Some((8, 64)));
        assert_eq!(of(8, 8, 4, &half), None);
        assert_eq!(of(2, 8, 64, &half), None);
        assert_eq!(of(64, 1, 64, &half), None);
        // Wide heads have one tile of rows.
        assert_eq!(of(64, 8, 32, &spec(12, 2, 128)), Some((2, 256)));
        assert_eq!(of(64, 8, 8, &spec(16, 8, 128)), Some((8, 64)));
        assert_eq!(of(64, 8, 64, &spec(16, 1, 128)), None);
        // A tile more than there are rows for is never asked for.
        assert_eq!(of(11, 3, 64, &half), Some((2, 24)));
    }
}
