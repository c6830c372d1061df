//! Masters, gradients and AdamW's moments of what trains, in flat arrays of f32; what the decoder reads of them is bf16 in
//! buffers of its own. Formulas and errors are those of the CPU's (cpu/params.rs).

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use cudarc::driver::{CudaSlice, DevicePtr};
use half::bf16;

use super::{
    kernels::Kernels,
    layout::{Layout, Param},
};
use crate::{
    backend::{
        OptimStep,
        cuda::{CudaError, device::Gpu},
    },
    error::PolicyError,
};

/// Numbers that a block of train_optim.cu takes.
const CHUNK: usize = 16_384;

/// Words of 8 bytes of an entry in its table of tensors.
const ENTRY: usize = 7;

/// `train_optim.cu`'s `AdamW`, field by field.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Constants {
    beta1: f32,
    beta2: f32,
    rate: f32,
    second: f32,
    eps: f32,
}

/// Operands of an update.
#[derive(Clone, Copy, Debug)]
pub(super) struct Update {
    pub(super) tensors: u64,
    /// Tensor and chunk of each block.
    pub(super) table: u64,
    pub(super) chunks: usize,
    pub(super) parts: u64,
    pub(super) norm: u64,
    pub(super) constants: Constants,
}

/// Which numbers AdamW's moments are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Moments {
    #[default]
    F32,
    /// Half the memory. Rounded to nearest: a moment that changes by less than a 512th of itself in a step stays as it is, so with
    /// `beta2` above 0.998 the second one no longer falls.
    Bf16,
}

impl Moments {
    fn width(self) -> usize {
        match self {
            Self::F32 => size_of::<f32>(),
            Self::Bf16 => size_of::<bf16>(),
        }
    }
}

/// See the file header.
pub(super) struct Optimizer {
    pub(super) layout: Layout,
    /// Per slot, the buffer that the decoder reads: bf16 beside its master, or the f32 that trains itself.
    weights: Vec<u64>,
    master: CudaSlice<f32>,
    gradients: CudaSlice<f32>,
    /// First and second, as `kind` says.
    moments: [CudaSlice<u8>; 2],
    kind: Moments,
    /// Slots whose gradient has been written since the last update.
    filled: Vec<bool>,
    tensors: CudaSlice<u64>,
    table: CudaSlice<i32>,
    chunks: usize,
    parts: CudaSlice<f64>,
    norm: CudaSlice<f32>,
    steps: u64,
}

/// Bytes of masters and moments, and of gradients.
pub(super) fn bytes(layout: &Layout, moments: Moments) -> (usize, usize) {
    let each = size_of::<f32>();
    let total = layout.total();
    (total * (each + 2 * moments.width()), total * each)
}

/// Tensor and chunk of every block, in order.
fn chunks(layout: &Layout) -> Vec<[i32; 2]> {
    let of_slot = |(index, len): (usize, usize)| {
        (0..len.div_ceil(CHUNK)).map(move |chunk| [index as i32, chunk as i32])
    };
    let lengths = layout.slots.iter().map(|slot| slot.len).enumerate();
    lengths.flat_map(of_slot).collect()
}

impl Optimizer {
    /// `weights`: address of each slot's buffer. Masters are to be set ([`Optimizer::set`]).
    pub(super) fn new(
        gpu: &Gpu,
        layout: Layout,
        weights: Vec<u64>,
        kind: Moments,
    ) -> Result<Self, CudaError> {
        let stream = &gpu.stream;
        let flat = || stream.alloc_zeros::<f32>(layout.total());
        let moment = || stream.alloc_zeros::<u8>(layout.total() * kind.width());
        let table = chunks(&layout);
        Ok(Self {
            master: flat()?,
            gradients: flat()?,
            moments: [moment()?, moment()?],
            kind,
            filled: vec![false; layout.slots.len()],
            tensors: stream.alloc_zeros(ENTRY * layout.slots.len())?,
            table: stream.clone_htod(table.as_flattened())?,
            chunks: table.len(),
            parts: stream.alloc_zeros(table.len())?,
            norm: stream.alloc_zeros(2)?,
            steps: 0,
            weights,
            layout,
        })
    }

    /// Address of a slot in a flat array.
    fn flat(&self, gpu: &Gpu, array: &CudaSlice<f32>, slot: usize) -> u64 {
        let offset = self.layout.slots[slot].offset * size_of::<f32>();
        array.device_ptr(&gpu.stream).0 + offset as u64
    }

    /// Address of a slot's moment.
    fn moment(&self, gpu: &Gpu, array: &CudaSlice<u8>, slot: usize) -> u64 {
        let offset = self.layout.slots[slot].offset * self.kind.width();
        array.device_ptr(&gpu.stream).0 + offset as u64
    }

    /// Address of the f32 that trains.
    pub(super) fn master(&self, gpu: &Gpu, slot: usize) -> u64 {
        match self.layout.slots[slot].matrix {
            true => self.flat(gpu, &self.master, slot),
            false => self.weights[slot],
        }
    }

    /// Address of what the decoder reads.
    pub(super) fn weight(&self, slot: usize) -> u64 {
        self.weights[slot]
    }

    /// Where the gradient of a slot goes, and whether it is to be added to what is there.
    pub(super) fn gradient(&mut self, gpu: &Gpu, slot: usize) -> (u64, bool) {
        let add = std::mem::replace(&mut self.filled[slot], true);
        (self.flat(gpu, &self.gradients, slot), add)
    }

    /// Address of all gradients and how many there are.
    pub(super) fn gradients(&self, gpu: &Gpu) -> (u64, usize) {
        let at = self.gradients.device_ptr(&gpu.stream).0;
        (at, self.gradients.len())
    }

    /// Makes all gradients 0 where there are none.
    pub(super) fn fill_with_zeros(&mut self, gpu: &Gpu) -> Result<(), CudaError> {
        if self.filled.contains(&true) {
            return Ok(());
        }
        let (at, len) = self.gradients(gpu);
        self.filled.fill(true);
        gpu.zero(at, len * size_of::<f32>())
    }

    /// Sets a weight: master, and what the decoder reads.
    pub(super) fn set(&self, gpu: &Gpu, param: &Param, values: &[f32]) -> Result<(), CudaError> {
        let window = param.window();
        let mut numbers = vec![0.0; window.len()];
        param.join(values, &mut numbers);
        let first = window.start as u64;
        gpu.write(self.master(gpu, param.slot) + 4 * first, &numbers)?;
        if self.layout.slots[param.slot].matrix {
            let rounded: Vec<bf16> = numbers.iter().map(|x| bf16::from_f32(*x)).collect();
            gpu.write(self.weights[param.slot] + 2 * first, &rounded)?;
        }
        Ok(())
    }

    fn read(&self, gpu: &Gpu, param: &Param, at: u64) -> Result<Tensor, PolicyError> {
        let window = param.window();
        let numbers = gpu.read::<f32>(at + 4 * window.start as u64, window.len())?;
        let values = param.split(&numbers);
        Ok(Tensor::from_vec(values, param.shape(), &Device::Cpu)?)
    }

    /// The weights, as they train.
    pub(super) fn export(&self, gpu: &Gpu) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        let params = self.layout.params.iter();
        params
            .map(|p| Ok((p.name.clone(), self.read(gpu, p, self.master(gpu, p.slot))?)))
            .collect()
    }

    /// Gradients summed up since the last update.
    pub(super) fn export_gradients(
        &self,
        gpu: &Gpu,
    ) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        let params = self.layout.params.iter().filter(|p| self.filled[p.slot]);
        params
            .map(|p| {
                let at = self.flat(gpu, &self.gradients, p.slot);
                Ok((p.name.clone(), self.read(gpu, p, at)?))
            })
            .collect()
    }

    /// Every weight must have been reached.
    pub(super) fn check_complete(&self) -> Result<(), PolicyError> {
        let mut params = self.layout.params.iter();
        match params.find(|p| !self.filled[p.slot]) {
            Some(p) => Err(PolicyError::MissingGradient {
                name: p.name.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Clips, updates, empties the gradients; returns the norm before clipping. Nothing is changed when a gradient is missing
    /// or not finite.
    pub(super) fn step(
        &mut self,
        gpu: &Gpu,
        kernels: &Kernels,
        hyper: &OptimStep,
    ) -> Result<f64, PolicyError> {
        self.check_complete()?;
        let entries = self.entries(gpu, hyper);
        let stream = &gpu.stream;
        stream
            .memcpy_htod(&entries, &mut self.tensors)
            .map_err(CudaError::from)?;
        let update = Update {
            tensors: self.tensors.device_ptr(stream).0,
            table: self.table.device_ptr(stream).0,
            chunks: self.chunks,
            parts: self.parts.device_ptr(stream).0,
            norm: self.norm.device_ptr(stream).0,
            constants: Constants::new(hyper, self.steps + 1),
        };
        kernels.global_norm(gpu, &update, hyper.max_grad_norm as f32)?;
        let norm = gpu.read::<f32>(update.norm, 1)?[0];
        if !norm.is_finite() {
            return Err(self.broken(gpu)?);
        }
        kernels.adamw(gpu, &update, self.kind)?;
        self.steps += 1;
        self.filled.fill(false);
        Ok(f64::from(norm))
    }

    /// The first weight whose gradient is not finite.
    fn broken(&self, gpu: &Gpu) -> Result<PolicyError, PolicyError> {
        for param in &self.layout.params {
            let window = param.window();
            let at = self.flat(gpu, &self.gradients, param.slot) + 4 * window.start as u64;
            let numbers = gpu.read::<f32>(at, window.len())?;
            if numbers.iter().any(|x| !x.is_finite()) {
                let name = param.name.clone();
                return Ok(PolicyError::NonFiniteGradient { name });
            }
        }
        let name = "all weights together".to_owned();
        Ok(PolicyError::NonFiniteGradient { name })
    }

    fn entries(&self, gpu: &Gpu, hyper: &OptimStep) -> Vec<u64> {
        let decay = (1.0 - hyper.learning_rate * hyper.weight_decay) as f32;
        let entry = |(index, slot): (usize, &super::layout::Slot)| {
            let weight = if slot.matrix { self.weights[index] } else { 0 };
            let [m, v] = self.moments.each_ref().map(|m| self.moment(gpu, m, index));
            [
                self.master(gpu, index),
                m,
                v,
                self.flat(gpu, &self.gradients, index),
                weight,
                slot.len as u64,
                u64::from(decay.to_bits()),
            ]
        };
        let slots = self.layout.slots.iter().enumerate();
        slots.flat_map(entry).collect()
    }

    /// Step count and moments, under torch's names.
    pub(super) fn export_state(&self, gpu: &Gpu) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        let steps = Tensor::new(&[self.steps as f32], &Device::Cpu)?;
        let mut out = BTreeMap::from([("step".to_owned(), steps)]);
        let params = self.layout.params.iter().filter(|_| self.steps > 0);
        for param in params {
            for (kind, array) in MOMENTS.iter().zip(&self.moments) {
                let numbers = self.read_moment(gpu, array, param)?;
                let values = param.split(&numbers);
                let tensor = Tensor::from_vec(values, param.shape(), &Device::Cpu)?;
                out.insert(format!("{}.{kind}", param.name), tensor);
            }
        }
        Ok(out)
    }

    /// The inverse of [`Optimizer::export_state`].
    pub(super) fn import_state(
        &mut self,
        gpu: &Gpu,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<(), PolicyError> {
        let get = |name: &str| {
            let name = name.to_owned();
            tensors
                .get(&name)
                .ok_or(PolicyError::MissingWeight { name })
        };
        // Exact as f32 up to 2²⁴ steps.
        let steps: Vec<f32> = get("step")?.to_vec1()?;
        self.steps = steps.first().copied().unwrap_or(0.0) as u64;
        for (kind, array) in MOMENTS.iter().zip(&self.moments) {
            gpu.zero(array.device_ptr(&gpu.stream).0, array.len())?;
            for param in self.layout.params.iter().filter(|_| self.steps > 0) {
                let name = format!("{}.{kind}", param.name);
                let values = numbers(&name, get(&name)?, param.count())?;
                let window = param.window();
                let mut joined = vec![0.0; window.len()];
                param.join(&values, &mut joined);
                let first = (window.start * self.kind.width()) as u64;
                let at = self.moment(gpu, array, param.slot) + first;
                match self.kind {
                    Moments::F32 => gpu.write(at, &joined)?,
                    Moments::Bf16 => {
                        let rounded: Vec<bf16> =
                            joined.iter().map(|x| bf16::from_f32(*x)).collect();
                        gpu.write(at, &rounded)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn read_moment(
        &self,
        gpu: &Gpu,
        array: &CudaSlice<u8>,
        param: &Param,
    ) -> Result<Vec<f32>, CudaError> {
        let window = param.window();
        let first = (window.start * self.kind.width()) as u64;
        let at = self.moment(gpu, array, param.slot) + first;
        match self.kind {
            Moments::F32 => gpu.read::<f32>(at, window.len()),
            Moments::Bf16 => {
                let numbers = gpu.read::<bf16>(at, window.len())?;
                Ok(numbers.into_iter().map(bf16::to_f32).collect())
            }
        }
    }
}

/// torch's names of the two moments.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

/// A tensor's numbers, of which there must be as many as the weight has.
pub(super) fn numbers(
    name: &str,
    tensor: &Tensor,
    expected: usize,
) -> Result<Vec<f32>, PolicyError> {
    if tensor.elem_count() != expected {
        return Err(PolicyError::WeightShape {
            name: name.to_owned(),
            found: tensor.dims().to_vec(),
            expected: vec![expected],
        });
    }
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

impl Constants {
    fn new(hyper: &OptimStep, step: u64) -> Self {
        let t = step as f64;
        Self {
            beta1: hyper.beta1 as f32,
            beta2: hyper.beta2 as f32,
            rate: (hyper.learning_rate / (1.0 - hyper.beta1.powf(t))) as f32,
            second: (1.0 / (1.0 - hyper.beta2.powf(t)).sqrt()) as f32,
            eps: hyper.eps as f32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::train::layout::Slot;

    #[test]
    fn every_number_has_one_block() {
        let slot = |offset, len| Slot {
            offset,
            len,
            matrix: true,
        };
        let layout = Layout {
            slots: vec![slot(0, CHUNK + 1), slot(16_512, 5), slot(16_640, 2 * CHUNK)],
            params: Vec::new(),
        };
        let expected = [[0, 0], [0, 1], [1, 0], [2, 0], [2, 1]];
        assert_eq!(chunks(&layout), expected);
        let total = 16_640 + 2 * CHUNK;
        assert_eq!(bytes(&layout, Moments::F32), (12 * total, 4 * total));
        assert_eq!(bytes(&layout, Moments::Bf16), (8 * total, 4 * total));
    }

    #[test]
    fn the_constants_of_the_second_step_by_hand() {
        let hyper = OptimStep {
            learning_rate: 0.1,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.5,
            max_grad_norm: 0.0,
        };
        let found = Constants::new(&hyper, 2);
        assert!((found.rate - 0.1 / 0.19).abs() < 1e-6);
        assert!((found.second - 1.0 / 0.0199f32.sqrt()).abs() < 1e-4);
    }
}
