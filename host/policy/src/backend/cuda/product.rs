//! Products on Hopper (hopper.cu): which tile serves a shape, where its operands lie, and the launch.

use std::{collections::HashMap, ffi::c_void, sync::Arc};

use cudarc::driver::{CudaFunction, CudaModule, sys};

use super::{CudaError, device::Gpu, launch::Launch};

/// Up to so many tokens these products are faster than cublasLt's with the kernels around them. On an H200, 0.5B: 6 % at 64
/// tokens and a step of 1 ms; at 128, cublasLt's is faster by 20 %.
pub(super) const MAX_TOKENS: usize = 64;

/// Columns of k in a box, 128 bytes: one row of the swizzle.
const BOX_COLUMNS: u32 = 64;

/// Rows of a warpgroup.
const BOX_ROWS: u32 = 64;

/// Tiles of the `rows` outputs that [`Form::Residual`] writes, and so sums of squares of a token.
pub(super) fn row_tiles(rows: usize) -> usize {
    rows.div_ceil(BOX_ROWS as usize)
}

/// What becomes of a product; the forms of hopper.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Form {
    /// To bf16.
    Store,
    /// Added to the residual stream, which is written once more as input of the next product.
    Residual,
    /// SwiGLU of both halves of the rows.
    Swiglu,
    /// To f32.
    Logits,
}

/// Shape of a block's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tile {
    /// Tokens.
    n: usize,
    /// Warpgroups, of 64 rows each.
    groups: usize,
    /// Steps of k that are on their way at once.
    stages: usize,
    /// Blocks that divide k.
    parts: usize,
}

impl Tile {
    /// The fastest of those tried for `tokens` tokens and `rows` outputs of `k` inputs each. Few outputs leave most of the GPU
    /// idle unless k is divided; many come in more blocks than fit at once unless a block is small or has many rows.
    pub(super) fn of(form: Form, tokens: usize, rows: usize, k: usize, processors: usize) -> Self {
        let many = rows.div_ceil(BOX_ROWS as usize) > 2 * processors;
        let deep = k > 2 * rows;
        let (n, groups, stages) = match (form, tokens) {
            (Form::Logits, 0..=16) => (16, 2, 4),
            (Form::Swiglu, 0..=16) if many => (16, 2, 4),
            (_, 0..=16) => (16, 1, 8),
            (_, 0..=32) | (Form::Store, 0..=64) => (32, 1, 5),
            (Form::Residual, 0..=64) if !deep => (32, 1, 5),
            (Form::Residual, _) => (64, 1, 6),
            (Form::Swiglu, _) if !many => (64, 1, 6),
            _ => (64, 1, 4),
        };
        // Never by the number of tokens: a sum must not depend on who else is in the pass.
        let parts = match form {
            Form::Swiglu | Form::Logits => 1,
            Form::Residual if deep => 8,
            Form::Store | Form::Residual => 4,
        };
        Self {
            n,
            groups,
            stages,
            parts,
        }
    }

    fn kernel(self, form: Form) -> String {
        let form = match form {
            Form::Store => "store",
            Form::Residual => "residual",
            Form::Swiglu => "swiglu",
            Form::Logits => "logits",
        };
        format!("{form}_{}_{}_{}", self.n, self.groups, self.stages)
    }

    /// The ring, and what its alignment may cost.
    fn shared_bytes(self) -> usize {
        self.stages * (self.groups * BOX_ROWS as usize + self.n) * 128 + 1024
    }
}

/// A matrix in global memory as the tensor memory accelerator knows it.
#[derive(Clone, Copy)]
pub(super) struct Map(sys::CUtensorMap);

impl Map {
    /// `[rows, columns]` of bf16, taken `box_rows` rows at a time; what lies outside reads as 0.
    fn new(address: u64, rows: usize, columns: usize, box_rows: u32) -> Result<Self, CudaError> {
        let dims = [columns as u64, rows as u64];
        Self::encode(
            address,
            &dims,
            &[2 * columns as u64],
            &[BOX_COLUMNS, box_rows],
        )
    }

    /// Weights, `[rows, columns]`.
    pub(super) fn weights(address: u64, rows: usize, columns: usize) -> Result<Self, CudaError> {
        Self::new(address, rows, columns, BOX_ROWS)
    }

    /// Gates and ups, `[2·half, columns]`: a box has 8 rows of one, the 8 of the other that belong to them, and so on.
    pub(super) fn pairs(address: u64, half: usize, columns: usize) -> Result<Self, CudaError> {
        let row = 2 * columns as u64;
        let dims = [columns as u64, 8, 2, half as u64 / 8];
        Self::encode(
            address,
            &dims,
            &[row, row * half as u64, 8 * row],
            &[BOX_COLUMNS, 8, 2, BOX_ROWS / 16],
        )
    }

    fn encode(
        address: u64,
        dims: &[u64],
        strides: &[u64],
        taken: &[u32],
    ) -> Result<Self, CudaError> {
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let steps = [1u32; 4];
        // SAFETY: the arrays have as many elements as there are dimensions (one less of strides), and are read before the
        // call returns. The address is not.
        let status = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                dims.len() as u32,
                address as *mut c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                taken.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        status.result()?;
        Ok(Self(map))
    }
}

/// A buffer of activations, `[T, columns]`, taken 16, 32 or 64 tokens at a time.
#[derive(Clone, Copy)]
pub(super) struct TokenMaps([Map; 3]);

impl TokenMaps {
    pub(super) fn new(address: u64, tokens: usize, columns: usize) -> Result<Self, CudaError> {
        let of = |taken| Map::new(address, tokens, columns, taken);
        Ok(Self([of(16)?, of(32)?, of(64)?]))
    }

    fn taken(&self, tokens: usize) -> &Map {
        &self.0[match tokens {
            0..=16 => 0,
            17..=32 => 1,
            _ => 2,
        }]
    }
}

/// `Product` of hopper.cu, field by field.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ProductArgs {
    pub(super) y: u64,
    pub(super) x: u64,
    pub(super) norm: u64,
    pub(super) sums_in: u64,
    pub(super) sums_out: u64,
    pub(super) tiles_in: i32,
    pub(super) stride: i32,
    pub(super) tokens: i32,
    pub(super) n: i32,
    pub(super) k: i32,
    pub(super) eps: f32,
}

/// The kernels of hopper.cu.
pub(super) struct Products {
    kernels: HashMap<(Form, String), CudaFunction>,
}

impl Products {
    /// Loads all of them.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for one that is not in the modules.
    pub(super) fn load(modules: &[Arc<CudaModule>]) -> Result<Self, CudaError> {
        let mut kernels = HashMap::new();
        for form in [Form::Store, Form::Residual, Form::Swiglu, Form::Logits] {
            for (tokens, rows, k) in [16, 32, 64, 65].into_iter().flat_map(|tokens| {
                [(64, 64), (64, 1 << 20), (1 << 20, 64)].map(|(rows, k)| (tokens, rows, k))
            }) {
                let tile = Tile::of(form, tokens, rows, k, 1);
                let name = tile.kernel(form);
                let kernel = super::device::roomy(modules, &name, tile.shared_bytes())?;
                kernels.insert((form, name), kernel);
            }
        }
        Ok(Self { kernels })
    }

    /// Queues a product of the weights `w` with the tokens of `x`.
    pub(super) fn run(
        &self,
        gpu: &Gpu,
        (form, tile): (Form, Tile),
        (w, x): (&Map, &TokenMaps),
        args: &ProductArgs,
    ) -> Result<(), CudaError> {
        let name = tile.kernel(form);
        let kernel = self.kernels.get(&(form, name));
        let kernel = kernel.ok_or(CudaError::NotYet("a product of this shape"))?;
        let tokens = (args.tokens as usize).div_ceil(tile.n);
        let launch = Launch {
            grid: (
                tile.parts * tokens,
                (args.n as usize).div_ceil(tile.groups * BOX_ROWS as usize),
                1,
            ),
            cluster: tile.parts as u32,
            shared: tile.shared_bytes(),
            ..Launch::of(1, 128 * tile.groups as u32 + 64)
        };
        let pointer = |value: *const c_void| value.cast_mut();
        let arguments = [
            pointer((&raw const w.0).cast()),
            pointer((&raw const x.taken(tile.n).0).cast()),
            pointer(std::ptr::from_ref(args).cast()),
        ];
        gpu.queue(kernel, launch, &arguments)
    }
}
