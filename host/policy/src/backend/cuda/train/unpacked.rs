//! Where training passes read matrices that stay quantised: each is made bf16 when it is wanted, one at a time, so that beside
//! the blocks there is only the largest of them.

use cudarc::driver::{CudaSlice, DevicePtr};
use half::bf16;

use super::{On, Training};
use crate::backend::cuda::{CudaError, quantized::Stored};

/// See the file header.
pub(super) struct Unpacked {
    /// Nothing where no matrix is quantised.
    buffer: Option<CudaSlice<bf16>>,
    /// Address of the blocks of the matrix that is there; 0 at first.
    holds: u64,
}

impl Unpacked {
    /// Room for the largest quantised matrix of the layers and the head.
    pub(super) fn new(on: On<'_>) -> Result<Self, CudaError> {
        let buffer = match on.weights.largest_quantized() {
            0 => None,
            n => Some(on.gpu.stream.alloc_zeros(n)?),
        };
        Ok(Self { buffer, holds: 0 })
    }
}

impl Training {
    /// Address of a matrix as bf16: of a quantised one until the next is asked for.
    pub(super) fn dense(&mut self, on: On<'_>, matrix: Stored) -> Result<u64, CudaError> {
        let blocks = match matrix {
            Stored::Bf16(address) => return Ok(address),
            Stored::Quantized(blocks) => blocks,
        };
        let Unpacked { buffer, holds } = &mut self.unpacked;
        let buffer = buffer.as_ref().ok_or(CudaError::StaysQuantized)?;
        let to = buffer.device_ptr(&on.gpu.stream).0;
        if *holds != blocks.quants {
            *holds = 0;
            on.gpu.unpack(blocks, to)?;
            *holds = blocks.quants;
        }
        Ok(to)
    }
}
