//! Matrices that are quantised on the device, and what is done with them (quantized.cu): products with few tokens read the
//! blocks; for other products a matrix is made bf16 in a scratch buffer first, each time it is used.

use std::sync::Arc;

use cudarc::driver::{CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr};
use half::bf16;

use super::{
    CudaBackend, CudaError,
    blocks::{BLOCK, Bits, Packed},
    device::{self, Gpu},
    launch::{Launch, pointer},
};

/// A weight matrix on the device, `[rows, columns]`.
pub(super) enum Linear {
    Bf16(CudaSlice<bf16>),
    Quantized(QuantizedLinear),
}

/// Its blocks, see [`Packed`].
pub(super) struct QuantizedLinear {
    bits: Bits,
    quants: CudaSlice<u8>,
    scales: CudaSlice<u32>,
}

/// Where a matrix lies.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stored {
    Bf16(u64),
    Quantized(Blocks),
}

impl Stored {
    /// Address of a bf16 matrix; `None` of a quantised one.
    pub(super) fn address(self) -> Option<u64> {
        match self {
            Self::Bf16(address) => Some(address),
            Self::Quantized(_) => None,
        }
    }

    /// Address of a bf16 matrix.
    ///
    /// # Errors
    /// [`CudaError::StaysQuantized`] for a quantised one.
    pub(super) fn dense(self) -> Result<u64, CudaError> {
        self.address().ok_or(CudaError::StaysQuantized)
    }
}

/// Addresses of some rows of a quantised matrix.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocks {
    pub(super) bits: Bits,
    pub(super) quants: u64,
    pub(super) scales: u64,
    /// All of them.
    weights: usize,
}

impl Blocks {
    /// `rows` rows of `columns` weights from row `first` on.
    pub(super) fn rows(self, first: usize, rows: usize, columns: usize) -> Self {
        let before = (first * columns / BLOCK) as u64;
        Self {
            quants: self.quants + before * self.bits.block_bytes() as u64,
            scales: self.scales + before * size_of::<u32>() as u64,
            weights: rows * columns,
            ..self
        }
    }
}

impl QuantizedLinear {
    pub(super) fn new(
        stream: &Arc<CudaStream>,
        bits: Bits,
        packed: &Packed,
    ) -> Result<Self, CudaError> {
        Ok(Self {
            bits,
            quants: stream.clone_htod(&packed.quants)?,
            scales: stream.clone_htod(&packed.scales)?,
        })
    }

    fn at(&self, stream: &Arc<CudaStream>) -> Blocks {
        Blocks {
            bits: self.bits,
            quants: self.quants.device_ptr(stream).0,
            scales: self.scales.device_ptr(stream).0,
            weights: self.weights(),
        }
    }

    fn weights(&self) -> usize {
        self.scales.len() * BLOCK
    }
}

impl Linear {
    pub(super) fn at(&self, stream: &Arc<CudaStream>) -> Stored {
        match self {
            Self::Bf16(matrix) => Stored::Bf16(matrix.device_ptr(stream).0),
            Self::Quantized(matrix) => Stored::Quantized(matrix.at(stream)),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Bf16(matrix) => matrix.num_bytes(),
            Self::Quantized(matrix) => matrix.quants.num_bytes() + matrix.scales.num_bytes(),
        }
    }

    pub(super) fn weights(&self) -> usize {
        match self {
            Self::Bf16(matrix) => matrix.len(),
            Self::Quantized(matrix) => matrix.weights(),
        }
    }

    /// Weights of a quantised matrix; 0 for another.
    pub(super) fn quantized_weights(&self) -> usize {
        match self {
            Self::Bf16(_) => 0,
            Self::Quantized(matrix) => matrix.weights(),
        }
    }

    /// A bf16 matrix in a buffer of its own.
    ///
    /// # Errors
    /// [`CudaError::StaysQuantized`] for a quantised one.
    pub(super) fn copy(&self, stream: &Arc<CudaStream>) -> Result<CudaSlice<bf16>, CudaError> {
        match self {
            Self::Bf16(matrix) => Ok(stream.clone_dtod(matrix)?),
            Self::Quantized(_) => Err(CudaError::StaysQuantized),
        }
    }

    /// Makes a quantised matrix bf16 for good.
    pub(super) fn dequantize(&mut self, gpu: &Gpu) -> Result<(), CudaError> {
        if let Self::Quantized(matrix) = self {
            let whole = gpu.stream.alloc_zeros(matrix.weights())?;
            let out = whole.device_ptr(&gpu.stream).0;
            gpu.unpack(matrix.at(&gpu.stream), out)?;
            *self = Self::Bf16(whole);
        }
        Ok(())
    }
}

/// The kernels of one width.
pub(super) struct Width {
    unpack: CudaFunction,
    unpack_rows: CudaFunction,
    pub(super) project: CudaFunction,
    pub(super) add: CudaFunction,
    pub(super) swiglu: CudaFunction,
    pub(super) head: CudaFunction,
}

/// The kernels of quantized.cu.
pub(super) struct QuantizedKernels {
    four: Width,
    eight: Width,
}

impl QuantizedKernels {
    pub(super) fn load(modules: &[Arc<CudaModule>]) -> Result<Self, CudaError> {
        let width = |bits: u32| -> Result<Width, CudaError> {
            let get = |name: &str| device::function(modules, &format!("{name}_{bits}"));
            let roomy = |name: &str| {
                device::roomy(modules, &format!("{name}_{bits}"), device::SHARED_BYTES)
            };
            Ok(Width {
                unpack: get("unpack")?,
                unpack_rows: get("unpack_rows")?,
                project: roomy("skinny_qkv")?,
                add: roomy("skinny_add")?,
                swiglu: roomy("skinny_swiglu")?,
                head: roomy("skinny_head")?,
            })
        };
        Ok(Self {
            four: width(4)?,
            eight: width(8)?,
        })
    }

    pub(super) fn of(&self, bits: Bits) -> &Width {
        match bits {
            Bits::Four => &self.four,
            Bits::Eight => &self.eight,
        }
    }
}

impl Gpu {
    /// Writes a matrix to `out` as bf16.
    pub(super) fn unpack(&self, w: Blocks, out: u64) -> Result<(), CudaError> {
        let eighths = (w.weights / 8) as i32;
        let arguments = [
            pointer(&w.quants),
            pointer(&w.scales),
            pointer(&out),
            pointer(&eighths),
        ];
        let launch = Launch::of((w.weights / 8).div_ceil(256), 256);
        self.queue(&self.quantized.of(w.bits).unpack, launch, &arguments)?;
        self.wrote_weights.set(true);
        Ok(())
    }

    /// Writes the rows of the `tokens` ids to `out` as bf16; a row has `columns` weights.
    pub(super) fn unpack_rows(
        &self,
        w: Blocks,
        (ids, out): (u64, u64),
        tokens: usize,
        columns: usize,
    ) -> Result<(), CudaError> {
        let k = columns as i32;
        let arguments = [
            pointer(&ids),
            pointer(&w.quants),
            pointer(&w.scales),
            pointer(&out),
            pointer(&k),
        ];
        let kernel = &self.quantized.of(w.bits).unpack_rows;
        self.queue(kernel, Launch::of(tokens, 128), &arguments)
    }
}

impl CudaBackend {
    /// Address of a matrix as bf16: its own or, made so there and until the next one is asked for, the scratch buffer's.
    pub(super) fn as_bf16(&self, matrix: Stored) -> Result<u64, CudaError> {
        match matrix {
            Stored::Bf16(address) => Ok(address),
            Stored::Quantized(blocks) => {
                let scratch = self.weights.scratch_at(&self.gpu.stream);
                self.gpu.unpack(blocks, scratch)?;
                Ok(scratch)
            }
        }
    }
}
