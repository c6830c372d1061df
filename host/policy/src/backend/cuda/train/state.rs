//! Weights, adapters and optimizer state between the device and files: by their checkpoint names, f32, fused matrices split
//! and joined.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use half::bf16;

use super::{
    Mode, ModelAt, NOTHING_TRAINS, On, Training,
    layout::{self, Layout, ModelSlots, Param},
    missing,
    optimizer::numbers,
};
use crate::{
    backend::cuda::{CudaBackend, CudaError},
    error::PolicyError,
};

type Tensors = BTreeMap<String, Tensor>;

/// Address of every slot of a model; `None` of a matrix that stays quantised.
fn addresses(at: &ModelAt, layout: &Layout, slots: &ModelSlots) -> Vec<Option<u64>> {
    let mut all = vec![None; layout.slots.len()];
    all[slots.embed] = at.embed.address();
    all[slots.head] = at.head.address();
    all[slots.norm] = Some(at.norm);
    for (slots, at) in slots.layers.iter().zip(&at.layers) {
        for (slot, address) in [
            (Some(slots.input_norm), Some(at.input_norm)),
            (Some(slots.qkv), at.qkv.address()),
            (slots.qkv_bias, Some(at.qkv_bias)),
            (slots.head_norms, Some(at.q_norm)),
            (Some(slots.o), at.o.address()),
            (Some(slots.mlp_norm), Some(at.mlp_norm)),
            (Some(slots.gate_up), at.gate_up.address()),
            (Some(slots.down), at.down.address()),
        ] {
            if let Some(slot) = slot {
                all[slot] = address;
            }
        }
    }
    all
}

/// A weight as the decoder reads it.
fn read(
    on: On<'_>,
    layout: &Layout,
    param: &Param,
    at: Option<u64>,
) -> Result<Tensor, PolicyError> {
    let at = at.ok_or(CudaError::StaysQuantized)?;
    let window = param.window();
    let (first, n) = (window.start as u64, window.len());
    let values: Vec<f32> = match layout.slots[param.slot].matrix {
        true => {
            let rounded = on.gpu.read::<bf16>(at + 2 * first, n)?;
            rounded.into_iter().map(bf16::to_f32).collect()
        }
        false => on.gpu.read(at + 4 * first, n)?,
    };
    let tensor = Tensor::from_vec(param.split(&values), param.shape(), &Device::Cpu)?;
    Ok(tensor)
}

fn write(
    on: On<'_>,
    layout: &Layout,
    (param, at): (&Param, Option<u64>),
    values: &[f32],
) -> Result<(), PolicyError> {
    let at = at.ok_or(CudaError::StaysQuantized)?;
    let window = param.window();
    let mut joined = vec![0.0; window.len()];
    param.join(values, &mut joined);
    let first = window.start as u64;
    match layout.slots[param.slot].matrix {
        true => {
            let rounded: Vec<bf16> = joined.iter().map(|x| bf16::from_f32(*x)).collect();
            on.gpu.write(at + 2 * first, &rounded)?;
        }
        false => on.gpu.write(at + 4 * first, &joined)?,
    }
    Ok(())
}

impl Training {
    /// The base weights, as they are now; adapters are not merged in.
    fn export_weights(&self, on: On<'_>) -> Result<Tensors, PolicyError> {
        let lora = match &self.mode {
            Mode::Full { .. } => return self.trains()?.export(on.gpu),
            Mode::Lora(lora) => Some(lora),
            Mode::Nothing => None,
        };
        let with = ModelAt::of(on.weights, on.gpu);
        let at = match lora {
            Some(lora) => lora.without(on.gpu, with),
            None => with,
        };
        let at = addresses(&at, &self.layout, &self.slots);
        let export = |param: &Param| {
            let exact = lora.map(|l| l.exact(&param.name)).transpose()?.flatten();
            let tensor = match exact {
                Some(exact) => exact,
                None => read(on, &self.layout, param, at[param.slot])?,
            };
            Ok((param.name.clone(), tensor))
        };
        self.layout.params.iter().map(export).collect()
    }

    /// Overwrites weights by name.
    fn import(&mut self, on: On<'_>, tensors: &Tensors) -> Result<(), PolicyError> {
        (self.saved, self.logits) = (None, None);
        for (name, tensor) in tensors {
            if let Some(optimizer) = &self.optimizer {
                let param = optimizer.layout.find(name).ok_or_else(|| missing(name))?;
                let values = numbers(name, tensor, param.count())?;
                optimizer.set(on.gpu, param, &values)?;
                continue;
            }
            let param = self.layout.find(name).ok_or_else(|| missing(name))?;
            let values = numbers(name, tensor, param.count())?;
            let at = ModelAt::of(on.weights, on.gpu);
            let at = addresses(&at, &self.layout, &self.slots)[param.slot];
            write(on, &self.layout, (param, at), &values)?;
        }
        if let (Mode::Lora(lora), Some(optimizer)) = (&self.mode, &self.optimizer) {
            lora.merge(on, &self.kernels, &mut self.gemm, optimizer)?;
        }
        Ok(())
    }
}

impl CudaBackend {
    pub(super) fn trained(&self) -> Result<(&Training, On<'_>), PolicyError> {
        let on = On {
            gpu: &self.gpu,
            weights: &self.weights,
            spec: &self.spec,
            room: None,
        };
        Ok((self.training.as_deref().ok_or(NOTHING_TRAINS)?, on))
    }

    /// Number of weights that train.
    pub fn trainable_parameters(&self) -> usize {
        let optimizer = self.training.as_ref().and_then(|t| t.optimizer.as_ref());
        optimizer.map_or(0, |optimizer| optimizer.layout.count())
    }

    /// Number of all weights, adapters included.
    pub fn parameters(&self) -> usize {
        let adapters = match self.training.as_deref().map(|t| &t.mode) {
            Some(Mode::Lora(_)) => self.trainable_parameters(),
            _ => 0,
        };
        self.spec.parameters() + adapters
    }

    /// The base weights, as they are now; adapters are not merged in. Of what does not train, as bf16 holds it.
    ///
    /// # Errors
    /// What the driver says.
    pub fn export_weights(&self) -> Result<Tensors, PolicyError> {
        if let Ok((training, on)) = self.trained() {
            return training.export_weights(on);
        }
        let on = On {
            gpu: &self.gpu,
            weights: &self.weights,
            spec: &self.spec,
            room: None,
        };
        let (layout, slots) = layout::of_model(&self.spec);
        let at = addresses(&ModelAt::of(on.weights, on.gpu), &layout, &slots);
        let params = layout.params.iter();
        params
            .map(|p| Ok((p.name.clone(), read(on, &layout, p, at[p.slot])?)))
            .collect()
    }

    /// The LoRA matrices (`….lora_A.weight`, `….lora_B.weight`); empty without LoRA.
    ///
    /// # Errors
    /// What the driver says.
    pub fn export_adapter(&self) -> Result<Tensors, PolicyError> {
        match self.trained() {
            Ok((training, on)) if matches!(training.mode, Mode::Lora(_)) => {
                training.trains()?.export(on.gpu)
            }
            _ => Ok(Tensors::new()),
        }
    }

    /// What trains: all weights, or the adapter. The content of a checkpoint.
    ///
    /// # Errors
    /// [`PolicyError::Misuse`] where nothing trains; what the driver says.
    pub fn export_trainable(&self) -> Result<Tensors, PolicyError> {
        let (training, on) = self.trained()?;
        training.trains()?.export(on.gpu)
    }

    /// Gradients summed up since the last optimizer step, by weight; for checks against other implementations.
    ///
    /// # Errors
    /// [`PolicyError::Misuse`] where nothing trains; what the driver says.
    pub fn export_gradients(&self) -> Result<Tensors, PolicyError> {
        let (training, on) = self.trained()?;
        training.trains()?.export_gradients(on.gpu)
    }

    /// Overwrites weights by name; the KV cache of the old ones is the caller's to drop.
    ///
    /// # Errors
    /// [`PolicyError::MissingWeight`] and [`PolicyError::WeightShape`]; what the driver says.
    pub fn import(&mut self, tensors: &Tensors) -> Result<(), PolicyError> {
        let (training, on) = self.with_training()?;
        training.import(on, tensors)?;
        self.forget_steps();
        Ok(())
    }

    /// Optimizer step count and moments.
    ///
    /// # Errors
    /// [`PolicyError::Misuse`] where nothing trains; what the driver says.
    pub fn export_optimizer(&self) -> Result<Tensors, PolicyError> {
        let (training, on) = self.trained()?;
        training.trains()?.export_state(on.gpu)
    }

    /// The inverse of [`CudaBackend::export_optimizer`].
    ///
    /// # Errors
    /// As for [`CudaBackend::import`].
    pub fn import_optimizer(&mut self, tensors: &Tensors) -> Result<(), PolicyError> {
        let (training, on) = self.with_training()?;
        let optimizer = training.optimizer.as_mut().ok_or(NOTHING_TRAINS)?;
        optimizer.import_state(on.gpu, tensors)
    }
}
