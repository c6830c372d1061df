//! One pass of the decoder, as a list of kernels on fixed buffers: the same for a captured decoding step and for a pass
//! of any shape.

use cudarc::driver::{CudaSlice, DevicePtr};
use half::bf16;

use super::{
    BLOCK_SIZE, CudaBackend, CudaError, CudaSizes,
    device::Gpu,
    gemm::{Operands, Shape},
    inputs::{Counts, Field, Inputs},
    launch::{Attention, Places},
    layer::WorkPointers,
    maps::Maps,
    parts::Part,
    product::{self, Form, Map, ProductArgs, Tile, TokenMaps},
    quantized::{Linear, Stored},
    siblings::Grid,
    skinny,
    weights::Layer,
};
use crate::{error::PolicyError, spec::ModelSpec};

/// Up to so many tokens the products of skinny.cu are faster than cublasLt's. On Hopper those of hopper.cu are faster still, by
/// 3 % at one token and 10 % at eight; but for quantised weights, which skinny.cu's alone read as they are. Reading those
/// again for every further 8 tokens was slower than making them bf16 first (docs/performance/rollouts.md).
const SKINNY_TOKENS: usize = 8;

/// Rows of logits, at least: those of the longest proposal of one sequence must fit together, and where a verification does
/// not fit, the head's weights are read again for each part.
pub(super) const MIN_LOGITS: usize = 256;

/// Splits of a sequence's keys, at most.
pub(super) const MAX_SPLITS: usize = 8;

/// Which products a pass is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Path {
    /// skinny.cu
    Skinny,
    /// hopper.cu
    Products,
    /// cublasLt
    Library,
}

/// Activations, made once for the largest pass.
pub(super) struct Work {
    /// Residual stream, f32 `[T, H]`.
    pub(super) x: CudaSlice<f32>,
    /// Normalised, `[T, H]`.
    pub(super) h: CudaSlice<bf16>,
    /// `[T, (Q + 2K)·D]`.
    pub(super) qkv: CudaSlice<bf16>,
    pub(super) q: CudaSlice<bf16>,
    pub(super) attended: CudaSlice<bf16>,
    /// `[T, 2F]`.
    pub(super) gate_up: CudaSlice<bf16>,
    pub(super) act: CudaSlice<bf16>,
    /// What a layer adds to the residual stream, `[T, H]`.
    pub(super) delta: CudaSlice<bf16>,
    /// Sums of squares of the residual stream, of each row tile that wrote it ([`super::product`]), `[tiles, T]`.
    pub(super) sums: CudaSlice<f32>,
    /// Hidden states that are sampled from, `[R, H]`.
    pub(super) picked: CudaSlice<bf16>,
    /// `[R, V]`.
    pub(super) logits: CudaSlice<f32>,
    pub(super) partial: CudaSlice<f32>,
    pub(super) tickets: CudaSlice<u32>,
    /// Rows of the first buffers, `T`.
    pub(super) max_tokens: usize,
    /// Rows of `logits`.
    pub(super) max_rows: usize,
    /// Tiles that may be split; a pass with more has work enough.
    split_tiles: usize,
}

impl Work {
    pub(super) fn new(gpu: &Gpu, spec: &ModelSpec, sizes: &CudaSizes) -> Result<Self, CudaError> {
        let (t, r) = (sizes.max_step_tokens, sizes.max_batch.max(MIN_LOGITS));
        let (h, q, f) = (spec.hidden_size, spec.q_dim(), spec.intermediate_size);
        let stream = &gpu.stream;
        let split_tiles = gpu.multiprocessors;
        let cells = split_tiles * spec.num_key_value_heads;
        Ok(Self {
            x: stream.alloc_zeros(t * h)?,
            h: stream.alloc_zeros(t * h)?,
            qkv: stream.alloc_zeros(t * (q + 2 * spec.kv_dim()))?,
            q: stream.alloc_zeros(t * q)?,
            attended: stream.alloc_zeros(t * q)?,
            gate_up: stream.alloc_zeros(t * 2 * f)?,
            act: stream.alloc_zeros(t * f)?,
            delta: stream.alloc_zeros(t * h)?,
            sums: stream.alloc_zeros(product::row_tiles(h) * t)?,
            picked: stream.alloc_zeros(r * h)?,
            logits: stream.alloc_zeros(r * spec.vocab_size)?,
            partial: stream.alloc_zeros(cells * MAX_SPLITS * 16 * (spec.head_dim + 2))?,
            tickets: stream.alloc_zeros(cells)?,
            max_tokens: t,
            max_rows: r,
            split_tiles,
        })
    }

    /// Refuses more rows of logits than there is room for.
    pub(super) fn check_rows(&self, asked: usize) -> Result<(), CudaError> {
        let (what, most) = ("sampled tokens", self.max_rows);
        match asked > most {
            true => Err(CudaError::Capacity { what, asked, most }),
            false => Ok(()),
        }
    }
}

/// What a pass reads and how.
#[derive(Clone, Copy, Debug)]
pub(super) struct PassArgs {
    pub(super) counts: Counts,
    /// Parts that a sequence's keys are divided into.
    pub(super) splits: usize,
    /// Every sequence has one token.
    pub(super) decode: bool,
    /// These read together what they share.
    pub(super) siblings: Option<Grid>,
    /// Choose the fastest algorithm of each product on the way.
    pub(super) tune: bool,
}

impl CudaBackend {
    /// Parts to divide the keys into, so that `tiles` fill the GPU.
    pub(super) fn splits(&self, tiles: usize) -> usize {
        if self.deterministic || tiles > self.work.split_tiles {
            return 1;
        }
        let blocks = tiles * self.spec.num_key_value_heads;
        (2 * self.gpu.multiprocessors / blocks.max(1)).clamp(1, MAX_SPLITS)
    }

    /// Runs the layers over the tokens in `inputs`, leaving the residual stream in `work.x`.
    pub(super) fn run_layers(
        &mut self,
        at: &Addresses,
        pass: &PassArgs,
    ) -> Result<(), PolicyError> {
        self.run_first_layers(self.spec.num_hidden_layers, at, pass)
    }

    /// The same with only the first `layers` layers.
    pub(super) fn run_first_layers(
        &mut self,
        layers: usize,
        at: &Addresses,
        pass: &PassArgs,
    ) -> Result<(), PolicyError> {
        let tokens = pass.counts.tokens;
        let (h, stream) = (self.spec.hidden_size, self.gpu.stream.clone());
        self.gpu.filter.enter(Part::Embed);
        let (ids, table) = match self.weights.embed.at(&stream) {
            Stored::Bf16(table) => (at.ids, table),
            Stored::Quantized(blocks) => {
                let rows = self.work.delta.device_ptr(&stream).0;
                self.gpu.unpack_rows(blocks, (at.ids, rows), tokens, h)?;
                (0, rows)
            }
        };
        let x = self.work.x.device_ptr(&stream).0;
        let (path, norm, out) = (
            self.path(tokens),
            self.norm_before(0),
            self.work.h.device_ptr(&stream).0,
        );
        match path {
            Path::Products => {
                let sums = self.work.sums.device_ptr(&stream).0;
                let (from, to) = ((ids, table, norm), (x, out, sums));
                self.gpu.embed_normed(from, to, tokens, h)?;
            }
            _ => self.gpu.embed(ids, table, x, tokens, h)?,
        }
        let kv = self
            .kv
            .as_ref()
            .ok_or(PolicyError::Misuse("step before init_kv"))?;
        let (base, blocks) = (kv.base, kv.blocks);
        let layer_bytes = (blocks * BLOCK_SIZE * self.spec.kv_dim() * size_of::<bf16>()) as u64;
        if path == Path::Library {
            self.gpu.filter.enter(Part::Norm);
            let eps = self.spec.rms_norm_eps as f32;
            self.gpu.rms_norm((x, 0, norm, out), 0, tokens, h, eps)?;
        }
        for index in 0..layers {
            let keys = base + 2 * index as u64 * layer_bytes;
            self.run_layer(index, at, pass, (keys, keys + layer_bytes))?;
        }
        Ok(())
    }

    /// The kernels that serve a pass of so many tokens best.
    pub(super) fn path(&self, tokens: usize) -> Path {
        let widths = [
            self.spec.q_dim() + 2 * self.spec.kv_dim(),
            self.spec.hidden_size,
        ];
        let hopper = self.maps.is_some() && tokens <= product::MAX_TOKENS;
        let few = tokens <= SKINNY_TOKENS
            && widths.iter().all(|width| width.is_multiple_of(16))
            && skinny::has_room_for(self.spec.hidden_size);
        if self.adapters.is_some() {
            // The other products are one with the norm before or the sum behind them, where adapters have to come between.
            Path::Library
        } else if self.deterministic {
            Path::Products
        } else if few && (!hopper || self.weights.is_mostly_quantized()) {
            Path::Skinny
        } else if hopper {
            Path::Products
        } else {
            Path::Library
        }
    }

    pub(super) fn maps(&self) -> Result<&Maps, CudaError> {
        self.maps.as_ref().ok_or(CudaError::NotYet(
            "deterministic mode before Hopper (compute capability 9.0)",
        ))
    }

    pub(super) fn product(
        &self,
        form: Form,
        w: &Map,
        x: &TokenMaps,
        args: &ProductArgs,
    ) -> Result<(), CudaError> {
        let (tokens, rows, k) = (args.tokens as usize, args.n as usize, args.k as usize);
        let tile = Tile::of(form, tokens, rows, k, self.gpu.multiprocessors);
        let products = self.gpu.products.as_ref();
        products
            .ok_or(CudaError::NotYet(
                "deterministic mode before Hopper (compute capability 9.0)",
            ))?
            .run(&self.gpu, (form, tile), (w, x), args)
    }

    /// Weights of the norm before layer `index`, or before the head.
    pub(super) fn norm_before(&self, index: usize) -> u64 {
        let layer = self
            .weights
            .layers
            .get(index)
            .map(|layer| &layer.input_norm);
        layer
            .unwrap_or(&self.weights.norm)
            .device_ptr(&self.gpu.stream)
            .0
    }

    /// y of [`Shape`] with a matrix of the layers or the head, by cublasLt.
    pub(super) fn matmul(
        &mut self,
        pass: &PassArgs,
        matrix: Matrix,
        shape: Shape,
        x: u64,
        y: u64,
    ) -> Result<(), PolicyError> {
        if pass.tune {
            let scratch = self.weights.scratch_at(&self.gpu.stream);
            let address = |stored| match stored {
                Stored::Bf16(address) => address,
                Stored::Quantized(_) => scratch,
            };
            let all = self.matrices(matrix.everywhere());
            let mut all: Vec<u64> = all.into_iter().map(address).collect();
            all.dedup();
            let operands: Vec<Operands> = all.into_iter().map(|w| Operands { w, x, y }).collect();
            self.gemm.tune(shape, &operands)?;
        }
        let w = self.as_bf16(self.matrices(matrix)[0])?;
        if !self.gpu.filter.admits() {
            return Ok(());
        }
        Ok(self.gemm.run(shape, Operands { w, x, y })?)
    }

    /// Where a matrix lies, of one layer or of all.
    fn matrices(&self, matrix: Matrix) -> Vec<Stored> {
        let stream = &self.gpu.stream;
        let (pick, layer): (fn(&Layer) -> &Linear, _) = match matrix {
            Matrix::Qkv(layer) => (|l| &l.qkv, layer),
            Matrix::O(layer) => (|l| &l.o, layer),
            Matrix::GateUp(layer) => (|l| &l.gate_up, layer),
            Matrix::Down(layer) => (|l| &l.down, layer),
            Matrix::Head => return vec![self.weights.head().at(stream)],
        };
        let layers = match layer {
            Some(index) => &self.weights.layers[index..=index],
            None => &self.weights.layers[..],
        };
        layers.iter().map(|l| pick(l).at(stream)).collect()
    }
}

/// A matrix of the decoder; `None` stands for all layers.
#[derive(Clone, Copy, Debug)]
pub(super) enum Matrix {
    Qkv(Option<usize>),
    O(Option<usize>),
    GateUp(Option<usize>),
    Down(Option<usize>),
    Head,
}

impl Matrix {
    fn everywhere(self) -> Self {
        match self {
            Self::Qkv(_) => Self::Qkv(None),
            Self::O(_) => Self::O(None),
            Self::GateUp(_) => Self::GateUp(None),
            Self::Down(_) => Self::Down(None),
            Self::Head => Self::Head,
        }
    }
}

/// Device addresses of a pass's inputs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Addresses {
    ids: u64,
    positions: u64,
    sequences: u64,
    tile_sequence: u64,
    tile_first: u64,
    q_start: u64,
    q_len: u64,
    kv_len: u64,
    pub(super) sampled: u64,
    tables: u64,
    table_width: i32,
}

impl Addresses {
    pub(super) fn of(inputs: &Inputs) -> Self {
        Self {
            ids: inputs.at(Field::Ids),
            positions: inputs.at(Field::Positions),
            sequences: inputs.at(Field::Sequences),
            tile_sequence: inputs.at(Field::TileSequence),
            tile_first: inputs.at(Field::TileFirst),
            q_start: inputs.at(Field::QStart),
            q_len: inputs.at(Field::QLen),
            kv_len: inputs.at(Field::KvLen),
            sampled: inputs.at(Field::Sampled),
            tables: inputs.at(Field::Tables),
            table_width: inputs.width() as i32,
        }
    }

    pub(super) fn places(&self) -> Places {
        Places {
            positions: self.positions,
            sequences: self.sequences,
            tables: self.tables,
            table_width: self.table_width,
        }
    }

    pub(super) fn attention(
        &self,
        work: &WorkPointers,
        (keys, values): (u64, u64),
        spec: &ModelSpec,
        splits: usize,
    ) -> Attention {
        Attention {
            q: work.q,
            keys,
            values,
            out: work.attended,
            tile_sequence: self.tile_sequence,
            tile_first: self.tile_first,
            q_start: self.q_start,
            q_len: self.q_len,
            kv_len: self.kv_len,
            tables: self.tables,
            partial: work.partial,
            tickets: work.tickets,
            table_width: self.table_width,
            q_heads: spec.num_attention_heads as i32,
            kv_heads: spec.num_key_value_heads as i32,
            splits: splits as i32,
            scale: std::f32::consts::LOG2_E / (spec.head_dim as f32).sqrt(),
        }
    }
}
