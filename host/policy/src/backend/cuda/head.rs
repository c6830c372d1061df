//! From hidden states to logits: by the products of the pass where all tokens are sampled from, else by cublasLt on those
//! that are.

use cudarc::driver::DevicePtr;

use super::{
    CudaBackend, CudaError,
    forward::{Addresses, Matrix, PassArgs, Path},
    gemm::{Operands, Out, Shape},
    parts::Part,
    product::{self, Form, ProductArgs},
    quantized::{Blocks, Stored},
    skinny::{Skinny, SkinnyArgs},
};
use crate::error::PolicyError;

impl CudaBackend {
    /// Logits of `n` sampled tokens from the `first` on.
    pub(super) fn head(
        &mut self,
        at: &Addresses,
        pass: &PassArgs,
        first: usize,
        n: usize,
    ) -> Result<(), PolicyError> {
        self.work.check_rows(n)?;
        let (h, v) = (self.spec.hidden_size, self.spec.vocab_size);
        let (eps, stream) = (self.spec.rms_norm_eps as f32, self.gpu.stream.clone());
        let norm = self.weights.norm.device_ptr(&stream).0;
        let head = self.weights.head().at(&stream);
        let (x, picked, logits) = (
            self.work.x.device_ptr(&stream).0,
            self.work.picked.device_ptr(&stream).0,
            self.work.logits.device_ptr(&stream).0,
        );
        // Where every token is sampled from, they lie in order.
        let in_order = n == pass.counts.tokens;
        self.gpu.filter.enter(Part::Head);
        let path = self.path(pass.counts.tokens);
        if in_order && path == Path::Skinny && v.is_multiple_of(16) {
            return Ok(self.skinny_head(norm, n)?);
        }
        // In the deterministic mode a token's logits come in one way only, whatever else the pass has.
        let whole = matches!(head, Stored::Bf16(_)) && !self.deterministic;
        if in_order && path == Path::Products && whole {
            let args = ProductArgs {
                y: logits,
                sums_in: self.work.sums.device_ptr(&stream).0,
                tiles_in: product::row_tiles(h) as i32,
                stride: self.work.max_tokens as i32,
                tokens: n as i32,
                n: v as i32,
                k: h as i32,
                eps,
                ..ProductArgs::default()
            };
            let maps = self.maps()?;
            return Ok(self.product(Form::Logits, &maps.head, &maps.h, &args)?);
        }
        // The last layer has left them normalised.
        let ready = in_order && path == Path::Library;
        if !ready {
            let rows = match in_order {
                true => 0,
                false => at.sampled + (first * size_of::<i32>()) as u64,
            };
            self.gpu.filter.enter(Part::Norm);
            self.gpu.rms_norm((x, 0, norm, picked), rows, n, h, eps)?;
        }
        let picked = if ready {
            self.work.h.device_ptr(&stream).0
        } else {
            picked
        };
        self.unembed(pass, picked, n)
    }

    /// Logits of the first `n` tokens of the residual stream behind the norm at an address, by [`Path::Skinny`]'s product.
    fn skinny_head(&self, norm: u64, n: usize) -> Result<(), CudaError> {
        let stream = &self.gpu.stream;
        let args = SkinnyArgs {
            w: self.weights.head().at(stream),
            x: self.work.x.device_ptr(stream).0,
            norm,
            y: self.work.logits.device_ptr(stream).0,
            tokens: n,
            outputs: self.spec.vocab_size,
            inputs: self.spec.hidden_size,
            eps: self.spec.rms_norm_eps as f32,
        };
        self.gpu.skinny(Skinny::Head, &args)
    }

    /// Logits of the `n` tokens that an early exit samples from, behind its norm, at addresses: `delta` is added to the
    /// residual stream first, 0 for nothing.
    pub(super) fn exit_head(
        &mut self,
        at: &Addresses,
        pass: &PassArgs,
        (delta, norm): (u64, u64),
        n: usize,
    ) -> Result<(), PolicyError> {
        self.work.check_rows(n)?;
        let (h, v) = (self.spec.hidden_size, self.spec.vocab_size);
        let (eps, stream) = (self.spec.rms_norm_eps as f32, self.gpu.stream.clone());
        let x = self.work.x.device_ptr(&stream).0;
        let picked = self.work.picked.device_ptr(&stream).0;
        let quantized = matches!(self.weights.head().at(&stream), Stored::Quantized(_));
        let few = n == pass.counts.tokens && self.path(n) == Path::Skinny;
        if quantized && few && v.is_multiple_of(16) {
            if delta != 0 {
                self.gpu.rms_norm((x, delta, norm, picked), 0, n, h, eps)?;
            }
            return Ok(self.skinny_head(norm, n)?);
        }
        self.gpu
            .rms_norm((x, delta, norm, picked), at.sampled, n, h, eps)?;
        self.unembed(pass, picked, n)
    }

    /// Logits of `n` normalised hidden states at an address: in the deterministic mode `work.picked`'s.
    pub(super) fn unembed(
        &mut self,
        pass: &PassArgs,
        hidden: u64,
        n: usize,
    ) -> Result<(), PolicyError> {
        let shape = Shape {
            tokens: n,
            outputs: self.spec.vocab_size,
            inputs: self.spec.hidden_size,
            stride: self.spec.vocab_size,
            out: Out::F32,
        };
        let logits = self.work.logits.device_ptr(&self.gpu.stream).0;
        self.gpu.filter.enter(Part::Head);
        if self.deterministic {
            let maps = self.maps()?;
            let args = ProductArgs {
                y: logits,
                tokens: n as i32,
                n: shape.outputs as i32,
                k: shape.inputs as i32,
                ..ProductArgs::default()
            };
            return Ok(self.product(Form::Logits, &maps.head, &maps.picked, &args)?);
        }
        if let Stored::Quantized(head) = self.weights.head().at(&self.gpu.stream) {
            return Ok(self.unembed_in_parts(pass, (head, shape), hidden, logits)?);
        }
        self.matmul(pass, Matrix::Head, shape, hidden, logits)
    }

    /// A head of blocks, of which the scratch buffer holds a part at a time.
    fn unembed_in_parts(
        &mut self,
        pass: &PassArgs,
        (head, whole): (Blocks, Shape),
        hidden: u64,
        logits: u64,
    ) -> Result<(), CudaError> {
        let (vocab, columns) = (whole.outputs, whole.inputs);
        let part = self.weights.head_part(vocab, columns);
        let scratch = self.weights.scratch_at(&self.gpu.stream);
        for first in (0..vocab).step_by(part) {
            let rows = part.min(vocab - first);
            let shape = Shape {
                outputs: rows,
                ..whole
            };
            let operands = Operands {
                w: scratch,
                x: hidden,
                y: logits + (first * size_of::<f32>()) as u64,
            };
            if pass.tune {
                self.gemm.tune(shape, &[operands])?;
            }
            self.gpu.unpack(head.rows(first, rows, columns), scratch)?;
            if self.gpu.filter.admits() {
                self.gemm.run(shape, operands)?;
            }
        }
        Ok(())
    }
}
