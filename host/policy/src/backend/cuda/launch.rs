//! The kernels as functions: grid and arguments of each launch, everything queued on the one stream.
//!
//! Addresses are plain numbers here, because a captured graph keeps them anyway. Who calls sees to it that they name
//! buffers of the shapes that the kernel's comment gives.

use std::ffi::c_void;

use cudarc::driver::{CudaFunction, sys};

use super::{
    CudaError,
    device::{AttentionKernel, Gpu},
};

/// `attention.cu`'s parameters, field by field.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Attention {
    pub(super) q: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) out: u64,
    pub(super) tile_sequence: u64,
    pub(super) tile_first: u64,
    pub(super) q_start: u64,
    pub(super) q_len: u64,
    pub(super) kv_len: u64,
    pub(super) tables: u64,
    pub(super) partial: u64,
    pub(super) tickets: u64,
    pub(super) table_width: i32,
    pub(super) q_heads: i32,
    pub(super) kv_heads: i32,
    pub(super) splits: i32,
    pub(super) scale: f32,
}

/// Grid, threads of a block and bytes of shared memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Launch {
    pub(super) grid: (usize, usize, usize),
    pub(super) threads: u32,
    /// Blocks of a cluster, neighbours in x; 1 on what does not know clusters.
    pub(super) cluster: u32,
    pub(super) shared: usize,
}

impl Launch {
    pub(super) fn of(blocks: usize, threads: u32) -> Self {
        Self {
            grid: (blocks, 1, 1),
            threads,
            cluster: 1,
            shared: 0,
        }
    }
}

/// An argument as [`Gpu::queue`] wants it; to live until that returns.
pub(super) fn pointer<T>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

/// Queues one kernel with these arguments.
macro_rules! launch {
    ($gpu:expr, $kernel:expr, $launch:expr, $($arg:expr),+ $(,)?) => {{
        let arguments = [$($crate::backend::cuda::launch::pointer($arg)),+];
        $gpu.queue($kernel, $launch, &arguments)
    }};
}
pub(super) use launch;

/// `qkv.cu`'s parameters, field by field; 0 for what a model does not have.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Projection {
    pub(super) qkv: u64,
    pub(super) bias: u64,
    pub(super) q_norm: u64,
    pub(super) k_norm: u64,
    pub(super) rope: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) q_heads: i32,
    pub(super) kv_heads: i32,
    pub(super) dim: i32,
    pub(super) eps: f32,
}

/// Where the tokens of a projection belong.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    pub(super) positions: u64,
    pub(super) sequences: u64,
    pub(super) tables: u64,
    pub(super) table_width: i32,
}

/// Tokens of a chunk in sample.cu.
pub(super) const CHUNK: usize = 512;

/// Words of a chunk's result there.
pub(super) const CHUNK_WORDS: usize = 3;

/// Arguments of sample.cu.
#[derive(Clone, Copy, Debug)]
pub(super) struct SampleArgs {
    pub(super) logits: u64,
    /// Room for what [`CHUNK`] tokens of a row come to.
    pub(super) chunks: u64,
    pub(super) temperature: u64,
    pub(super) uniform: u64,
    pub(super) token: u64,
    pub(super) logprob: u64,
    pub(super) step: u64,
    pub(super) stride: i32,
    pub(super) vocab: i32,
}

impl AttentionKernel {
    fn launch(&self, args: &Attention, tiles: usize) -> Launch {
        Launch {
            grid: (tiles, args.kv_heads as usize, args.splits as usize),
            shared: self.shared,
            ..Launch::of(1, self.threads)
        }
    }
}

/// Words of 8 bytes of what draw.cu finds in a chunk.
pub(super) const NEAR_WORDS: usize = 6;

/// Tokens that draw.cu lists in shared memory.
const DRAW_LIST: usize = 8192;

/// `draw.cu`'s parameters, field by field.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Draw {
    pub(super) logits: u64,
    pub(super) chunks: u64,
    pub(super) near: u64,
    pub(super) temperature: u64,
    pub(super) asks: u64,
    pub(super) uniform: u64,
    pub(super) token: u64,
    pub(super) logprob: u64,
    pub(super) policy: u64,
    pub(super) verdicts: u64,
    pub(super) step: u64,
    pub(super) stride: i32,
    pub(super) vocab: i32,
}

impl Gpu {
    /// Where the GPU can, a kernel is launched while the one before it ends (common.cu says how they keep order).
    pub(super) fn queue(
        &self,
        kernel: &CudaFunction,
        launch: Launch,
        arguments: &[*mut c_void],
    ) -> Result<(), CudaError> {
        use sys::CUlaunchAttributeID as Id;
        if !self.filter.admits() {
            return Ok(());
        }
        let attribute = |id, value| sys::CUlaunchAttribute {
            id,
            pad: [0; 4],
            value,
        };
        let after_weights = self.wrote_weights.take();
        let overlap = sys::CUlaunchAttributeValue {
            programmaticStreamSerializationAllowed: i32::from(!after_weights),
        };
        let cluster = sys::CUlaunchAttributeValue {
            clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
                x: launch.cluster,
                y: 1,
                z: 1,
            },
        };
        let mut attributes = [
            attribute(
                Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                overlap,
            ),
            attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, cluster),
        ];
        let known = match launch.cluster {
            1 => u32::from(self.overlaps),
            _ => 2,
        };
        let (x, y, z) = launch.grid;
        let config = sys::CUlaunchConfig {
            gridDimX: x as u32,
            gridDimY: y as u32,
            gridDimZ: z as u32,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared as u32,
            hStream: self.stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: known,
        };
        self.stream.context().bind_to_thread()?;
        // SAFETY: number and types of the arguments are those of the kernel, and they live until the call returns,
        // which copies them; the addresses among them name live buffers of the shapes it works on (file header).
        let status = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                kernel.cu_function(),
                arguments.as_ptr().cast_mut(),
                std::ptr::null_mut(),
            )
        };
        Ok(status.result()?)
    }

    /// `embed` for [`super::product`]: the residual stream x, its input h to the first product, and `sums`.
    pub(super) fn embed_normed(
        &self,
        (ids, table, norm): (u64, u64, u64),
        (x, h, sums): (u64, u64, u64),
        tokens: usize,
        hidden: usize,
    ) -> Result<(), CudaError> {
        let hidden = hidden as i32;
        launch!(
            self,
            &self.kernels.embed_normed,
            Launch::of(tokens, 256),
            &ids,
            &table,
            &norm,
            &x,
            &h,
            &sums,
            &hidden
        )
    }

    pub(super) fn embed(
        &self,
        ids: u64,
        table: u64,
        x: u64,
        tokens: usize,
        hidden: usize,
    ) -> Result<(), CudaError> {
        let hidden = hidden as i32;
        launch!(
            self,
            &self.kernels.embed,
            Launch::of(tokens, 256),
            &ids,
            &table,
            &x,
            &hidden
        )
    }

    /// `delta`: address of what is added to x first, 0 for nothing; `rows`: address of the rows to take, 0 for all.
    pub(super) fn rms_norm(
        &self,
        (x, delta, weight, out): (u64, u64, u64, u64),
        rows: u64,
        n: usize,
        hidden: usize,
        eps: f32,
    ) -> Result<(), CudaError> {
        let wide = hidden > 128 * 8;
        let hidden = hidden as i32;
        // With few rows a block for each is faster.
        if n > 256 && hidden <= 128 * 16 {
            let (kernel, count) = (&self.kernels.norm_rows[usize::from(wide)], n as i32);
            let launch = Launch::of(n.div_ceil(4), 128);
            return launch!(
                self, kernel, launch, &x, &delta, &weight, &out, &rows, &count, &hidden, &eps
            );
        }
        let kernel = &self.kernels.rms_norm;
        launch!(
            self,
            kernel,
            Launch::of(n, 256),
            &x,
            &delta,
            &weight,
            &out,
            &rows,
            &hidden,
            &eps
        )
    }

    pub(super) fn silu_mul(
        &self,
        gate_up: u64,
        out: u64,
        tokens: usize,
        width: usize,
    ) -> Result<(), CudaError> {
        let eighth = (width / 8) as i32;
        let launch = Launch {
            grid: ((width / 8).div_ceil(256), tokens, 1),
            ..Launch::of(1, 256)
        };
        launch!(
            self,
            &self.kernels.silu_mul,
            launch,
            &gate_up,
            &out,
            &eighth
        )
    }

    /// Queries to `q`, keys and values to the cache.
    pub(super) fn qkv_rope_cache(
        &self,
        from: &Projection,
        at: &Places,
        q: u64,
        tokens: usize,
    ) -> Result<(), CudaError> {
        let warps = tokens * (from.q_heads + 2 * from.kv_heads) as usize;
        let count = tokens as i32;
        launch!(
            self,
            &self.kernels.qkv_rope_cache,
            Launch::of(warps.div_ceil(4), 128),
            from,
            &at.positions,
            &at.sequences,
            &at.tables,
            &at.table_width,
            &q,
            &count,
        )
    }

    /// Sequences of any number of tokens.
    pub(super) fn attention(&self, args: &Attention, tiles: usize) -> Result<(), CudaError> {
        let kernel = &self.kernels.attention;
        launch!(self, &kernel.function, kernel.launch(args, tiles), args)
    }

    /// Sequences of one token, which comes straight from the projection.
    pub(super) fn decode(
        &self,
        args: &Attention,
        from: &Projection,
        sequences: usize,
    ) -> Result<(), CudaError> {
        let few = sequences * args.kv_heads as usize * args.splits as usize <= self.multiprocessors;
        let kernel = match few || args.splits > 1 {
            true => &self.kernels.decode_few,
            false => &self.kernels.decode_many,
        };
        let launch = kernel.launch(args, sequences);
        launch!(self, &kernel.function, launch, args, from)
    }

    fn sum_chunks(
        &self,
        (logits, temperature, chunks): (u64, u64, u64),
        vocab: i32,
        rows: usize,
    ) -> Result<(), CudaError> {
        let count = (vocab as usize).div_ceil(CHUNK);
        let launch = Launch {
            grid: (count.div_ceil(8), rows, 1),
            ..Launch::of(1, 256)
        };
        let kernel = &self.kernels.sum_chunks;
        launch!(self, kernel, launch, &logits, &temperature, &chunks, &vocab)
    }

    /// Truncated draws and verification of `rows` rows.
    pub(super) fn draw(&self, draw: &Draw, rows: usize) -> Result<(), CudaError> {
        let of = (draw.logits, draw.temperature, draw.chunks);
        self.sum_chunks(of, draw.vocab, rows)?;
        let chunks = (draw.vocab as usize).div_ceil(CHUNK);
        let launch = Launch {
            grid: (chunks.div_ceil(8), rows, 1),
            ..Launch::of(1, 256)
        };
        launch!(self, &self.kernels.survey_chunks, launch, draw)?;
        let launch = Launch {
            shared: DRAW_LIST * 8,
            ..Launch::of(rows, 1024)
        };
        launch!(self, &self.kernels.draw, launch, draw)
    }

    pub(super) fn sample(&self, a: &SampleArgs, rows: usize) -> Result<(), CudaError> {
        self.sum_chunks((a.logits, a.temperature, a.chunks), a.vocab, rows)?;
        launch!(
            self,
            &self.kernels.sample,
            Launch::of(rows, 32),
            &a.logits,
            &a.chunks,
            &a.temperature,
            &a.uniform,
            &a.token,
            &a.logprob,
            &a.step,
            &a.stride,
            &a.vocab,
        )
    }

    /// `fields`: addresses of ids, positions, kv_len, left, token, step.
    pub(super) fn advance(
        &self,
        fields: &[u64; 6],
        stride: i32,
        rows: usize,
    ) -> Result<(), CudaError> {
        let [ids, positions, kv_len, left, token, step] = fields;
        let count = rows as i32;
        let threads = (rows as u32).next_multiple_of(32);
        launch!(
            self,
            &self.kernels.advance,
            Launch::of(1, threads),
            ids,
            positions,
            kv_len,
            left,
            token,
            step,
            &stride,
            &count,
        )
    }

    /// `pool`: all layers, keys and values, `layer_bytes` apart; `pairs`: address of `n` pairs.
    pub(super) fn copy_blocks(
        &self,
        pool: u64,
        pairs: u64,
        n: usize,
        (layers, layer_bytes, block_bytes): (usize, usize, usize),
    ) -> Result<(), CudaError> {
        let (layer_words, block_words) = ((layer_bytes / 16) as u64, (block_bytes / 16) as i32);
        let launch = Launch {
            grid: (2 * layers, n, 1),
            ..Launch::of(1, 128)
        };
        launch!(
            self,
            &self.kernels.copy_blocks,
            launch,
            &pool,
            &pairs,
            &layer_words,
            &block_words
        )
    }
}
