//! The weights by name, their gradients, and AdamW. Nothing here knows what a layer is.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::{
    mat::{Mat, View},
    simd::{dispatch, sum_of_squares},
};
use crate::{
    backend::{OptimStep, group::Seat},
    error::PolicyError,
};

/// Index into [`Params`].
pub(crate) type ParamId = usize;

/// One weight. Vectors are `[1, n]`.
#[derive(Clone, Debug)]
pub(crate) struct Param {
    pub(crate) name: String,
    pub(crate) value: Mat,
    pub(crate) trainable: bool,
    /// Dimensions on disk: 1 for norms and biases, 2 for matrices.
    rank: usize,
}

/// All weights of a model, in the order they were added.
#[derive(Clone, Debug, Default)]
pub(crate) struct Params {
    list: Vec<Param>,
    by_name: HashMap<String, ParamId>,
}

impl Params {
    pub(crate) fn add(&mut self, name: &str, value: Mat, rank: usize, trainable: bool) -> ParamId {
        self.by_name.insert(name.to_owned(), self.list.len());
        self.list.push(Param {
            name: name.to_owned(),
            value,
            trainable,
            rank,
        });
        self.list.len() - 1
    }

    /// The weight's matrix.
    pub(crate) fn mat(&self, id: ParamId) -> &Mat {
        &self.list[id].value
    }

    /// The weight's numbers.
    pub(crate) fn data(&self, id: ParamId) -> &[f32] {
        self.list[id].value.data()
    }

    pub(crate) fn trainable(&self, id: ParamId) -> bool {
        self.list[id].trainable
    }

    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Param> {
        self.list.iter()
    }

    /// Numbers that train.
    pub(crate) fn trainable_count(&self) -> usize {
        let trained = self.list.iter().filter(|p| p.trainable);
        trained.map(|p| p.value.data().len()).sum()
    }

    /// Adds `by(name, index)` to every number of one weight.
    #[cfg(test)]
    pub(crate) fn nudge(&mut self, id: ParamId, by: impl Fn(&str, usize) -> f32) {
        let param = &mut self.list[id];
        for (i, value) in param.value.data_mut().iter_mut().enumerate() {
            *value += by(&param.name, i);
        }
    }

    /// The weights `wanted` picks, as tensors with their on-disk shape.
    pub(crate) fn export(
        &self,
        wanted: impl Fn(&Param) -> bool,
    ) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        let picked = self.list.iter().filter(|p| wanted(p));
        picked
            .map(|p| Ok((p.name.clone(), to_tensor(p, p.value.data())?)))
            .collect()
    }

    /// Overwrites the named weights; names and shapes must exist here.
    pub(crate) fn import(&mut self, tensors: &BTreeMap<String, Tensor>) -> Result<(), PolicyError> {
        for (name, tensor) in tensors {
            let missing = || PolicyError::MissingWeight { name: name.clone() };
            let id = *self.by_name.get(name).ok_or_else(missing)?;
            let param = &mut self.list[id];
            let values = to_vec(name, tensor, param.value.data().len())?;
            param.value.data_mut().copy_from_slice(&values);
        }
        Ok(())
    }
}

fn to_tensor(param: &Param, values: &[f32]) -> Result<Tensor, PolicyError> {
    let shape = match param.rank {
        1 => vec![param.value.cols],
        _ => vec![param.value.rows, param.value.cols],
    };
    Ok(Tensor::from_slice(values, shape, &Device::Cpu)?)
}

fn to_vec(name: &str, tensor: &Tensor, expected: usize) -> Result<Vec<f32>, PolicyError> {
    if tensor.elem_count() != expected {
        return Err(PolicyError::WeightShape {
            name: name.to_owned(),
            found: tensor.dims().to_vec(),
            expected: vec![expected],
        });
    }
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// Gradients of the trainable weights, filled by backward passes and emptied by the optimizer.
#[derive(Debug)]
pub(crate) struct Grads(Vec<Option<Mat>>);

impl Grads {
    pub(crate) fn new(params: &Params) -> Self {
        Self(vec![None; params.len()])
    }

    /// The gradient to add into, zeros at first.
    pub(crate) fn slot(&mut self, id: ParamId, params: &Params) -> &mut Mat {
        let value = params.mat(id);
        self.0[id].get_or_insert_with(|| Mat::zeros(value.rows, value.cols))
    }

    /// Adds `a · b` to one gradient. The first product is written, not added to zeros.
    pub(crate) fn add_product(&mut self, id: ParamId, a: View<'_>, b: View<'_>) {
        match &mut self.0[id] {
            Some(sum) => sum.add_product(a, b),
            empty => *empty = Some(a.mul(b)),
        }
    }

    #[cfg(test)]
    pub(crate) fn get(&self, id: ParamId) -> Option<&Mat> {
        self.0[id].as_ref()
    }

    /// Every trainable weight must have been reached: a silent hole in the graph is the classic bug.
    pub(crate) fn check_complete(&self, params: &Params) -> Result<(), PolicyError> {
        let missing = params
            .iter()
            .zip(&self.0)
            .find(|(p, g)| p.trainable && g.is_none());
        missing.map_or(Ok(()), |(p, _)| {
            Err(PolicyError::MissingGradient {
                name: p.name.clone(),
            })
        })
    }

    /// Makes them those of all ranks together. A rank without any had no batch, and adds nothing.
    ///
    /// # Errors
    /// [`PolicyError::MissingGradient`] where some are missing; [`PolicyError::RankFailed`].
    pub(crate) fn sum_over(&mut self, seat: &Seat, params: &Params) -> Result<(), PolicyError> {
        if self.0.iter().any(Option::is_some) {
            self.check_complete(params)?;
        }
        let trained = params.iter().enumerate().filter(|(_, p)| p.trainable);
        let ids: Vec<ParamId> = trained.map(|(id, _)| id).collect();
        let mine = ids.iter().map(|id| self.slot(*id, params).data().to_vec());
        let sum = seat.sum(mine.collect::<Vec<_>>().concat())?;
        let mut rest = sum.as_slice();
        for id in ids {
            let to = self.slot(id, params).data_mut();
            let (part, later) = rest.split_at(to.len());
            to.copy_from_slice(part);
            rest = later;
        }
        Ok(())
    }

    /// Global 2-norm; names the weight whose gradient is not finite.
    fn norm(&self, params: &Params) -> Result<f64, PolicyError> {
        let mut total = 0.0;
        for (param, grad) in params.iter().zip(&self.0) {
            let Some(grad) = grad else { continue };
            let runs = grad.data().par_chunks(1 << 16).map(sum_of_squares);
            let squares: f64 = runs.collect::<Vec<f64>>().iter().sum();
            if !squares.is_finite() {
                return Err(PolicyError::NonFiniteGradient {
                    name: param.name.clone(),
                });
            }
            total += squares;
        }
        Ok(total.sqrt())
    }

    pub(crate) fn clear(&mut self) {
        self.0.fill(None);
    }

    /// As tensors with the shape of their weight.
    pub(crate) fn export(&self, params: &Params) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        let filled = params.iter().zip(&self.0);
        filled
            .filter_map(|(param, grad)| Some((param, grad.as_ref()?)))
            .map(|(param, grad)| Ok((param.name.clone(), to_tensor(param, grad.data())?)))
            .collect()
    }
}

/// AdamW with f32 moments (Loshchilov & Hutter 2019; bias correction as in torch).
#[derive(Debug, Default)]
pub(crate) struct AdamW {
    steps: u64,
    /// First and second moment per weight; made at its first update.
    moments: BTreeMap<ParamId, (Vec<f32>, Vec<f32>)>,
}

impl AdamW {
    /// Clips, updates all trainable weights, empties `grads`; returns the norm before clipping.
    /// Nothing is changed when a gradient is missing or not finite.
    pub(crate) fn step(
        &mut self,
        params: &mut Params,
        grads: &mut Grads,
        hyper: &OptimStep,
    ) -> Result<f64, PolicyError> {
        grads.check_complete(params)?;
        let norm = grads.norm(params)?;
        let clipped = hyper.max_grad_norm > 0.0 && norm > hyper.max_grad_norm;
        let clip = if clipped {
            hyper.max_grad_norm / (norm + 1e-6)
        } else {
            1.0
        };
        self.steps += 1;
        let update = Update::new(hyper, self.steps, clip);
        for (id, param) in params
            .list
            .iter_mut()
            .enumerate()
            .filter(|(_, p)| p.trainable)
        {
            let Some(grad) = &grads.0[id] else { continue };
            let n = grad.data().len();
            let (m, v) = self
                .moments
                .entry(id)
                .or_insert_with(|| (vec![0.0; n], vec![0.0; n]));
            update.apply(param.value.data_mut(), grad.data(), m, v);
        }
        grads.clear();
        Ok(norm)
    }

    /// Step count and moments as tensors, `NAME.exp_avg` and `NAME.exp_avg_sq` as torch calls them.
    pub(crate) fn export(&self, params: &Params) -> Result<BTreeMap<String, Tensor>, PolicyError> {
        let mut out = BTreeMap::new();
        out.insert(
            "step".to_owned(),
            Tensor::new(&[self.steps as f32], &Device::Cpu)?,
        );
        for (id, (m, v)) in &self.moments {
            let param = &params.list[*id];
            out.insert(format!("{}.exp_avg", param.name), to_tensor(param, m)?);
            out.insert(format!("{}.exp_avg_sq", param.name), to_tensor(param, v)?);
        }
        Ok(out)
    }

    /// The inverse of [`AdamW::export`].
    pub(crate) fn import(
        &mut self,
        params: &Params,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<(), PolicyError> {
        let get = |name: String| {
            let found = tensors.get(&name);
            found.ok_or(PolicyError::MissingWeight { name })
        };
        // Exact as f32 up to 2²⁴ steps.
        let steps: Vec<f32> = get("step".to_owned())?.to_vec1()?;
        self.steps = steps.first().copied().unwrap_or(0.0) as u64;
        self.moments.clear();
        for (id, param) in params.list.iter().enumerate().filter(|(_, p)| p.trainable) {
            if self.steps == 0 {
                break;
            }
            let moment = |kind: &str| {
                let name = format!("{}.{kind}", param.name);
                let tensor = get(name.clone())?;
                to_vec(&name, tensor, param.value.data().len())
            };
            self.moments
                .insert(id, (moment("exp_avg")?, moment("exp_avg_sq")?));
        }
        Ok(())
    }
}

/// The constants of one AdamW update.
struct Update {
    clip: f32,
    beta1: f32,
    beta2: f32,
    /// `lr / (1 − β₁ᵗ)`.
    rate: f32,
    /// `1 / √(1 − β₂ᵗ)`.
    second: f32,
    eps: f32,
    /// `1 − lr·λ`.
    decay: f32,
}

impl Update {
    fn new(hyper: &OptimStep, step: u64, clip: f64) -> Self {
        let t = step as f64;
        Self {
            clip: clip as f32,
            beta1: hyper.beta1 as f32,
            beta2: hyper.beta2 as f32,
            rate: (hyper.learning_rate / (1.0 - hyper.beta1.powf(t))) as f32,
            second: (1.0 / (1.0 - hyper.beta2.powf(t)).sqrt()) as f32,
            eps: hyper.eps as f32,
            decay: (1.0 - hyper.learning_rate * hyper.weight_decay) as f32,
        }
    }

    fn apply(&self, w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        const RUN: usize = 1 << 14;
        let runs = w.par_chunks_mut(RUN).zip(g.par_chunks(RUN));
        let moments = m.par_chunks_mut(RUN).zip(v.par_chunks_mut(RUN));
        runs.zip(moments).for_each(|((w, g), (m, v))| {
            dispatch(
                #[inline(always)]
                || {
                    let moments = m.iter_mut().zip(v.iter_mut());
                    for ((w, g), (m, v)) in w.iter_mut().zip(g).zip(moments) {
                        let g = g * self.clip;
                        *m += (1.0 - self.beta1) * (g - *m);
                        *v += (1.0 - self.beta2) * (g * g - *v);
                        *w = *w * self.decay - self.rate * *m / (v.sqrt() * self.second + self.eps);
                    }
                },
            );
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYPER: OptimStep = OptimStep {
        learning_rate: 0.1,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.5,
        max_grad_norm: 0.0,
    };

    fn one(value: f32) -> (Params, Grads) {
        let mut params = Params::default();
        params.add("w", Mat::from_vec(1, 1, vec![value]), 1, true);
        let grads = Grads::new(&params);
        (params, grads)
    }

    fn fill(grads: &mut Grads, params: &Params, value: f32) {
        grads.slot(0, params).data_mut().fill(value);
    }

    #[test]
    fn two_steps_by_hand() {
        let (mut params, mut grads) = one(2.0);
        let mut optimizer = AdamW::default();
        // Step 1: m̂ = g and v̂ = g², so w = 2·(1 − 0.1·0.5) − 0.1.
        fill(&mut grads, &params, 3.0);
        optimizer.step(&mut params, &mut grads, &HYPER).unwrap();
        assert!((params.data(0)[0] - 1.8).abs() < 1e-6);
        // Step 2 with g = 1: m = 0.9·0.3 + 0.1 = 0.37, v = 0.99·0.09 + 0.01 = 0.0991.
        fill(&mut grads, &params, 1.0);
        optimizer.step(&mut params, &mut grads, &HYPER).unwrap();
        let step = 0.1 * (0.37 / 0.19) / (0.0991f64 / 0.0199).sqrt();
        assert!((f64::from(params.data(0)[0]) - (1.8 * 0.95 - step)).abs() < 1e-6);
    }

    #[test]
    fn clipping_scales_to_the_norm_and_reports_the_one_before() {
        let (mut params, mut grads) = one(0.0);
        let mut optimizer = AdamW::default();
        fill(&mut grads, &params, 4.0);
        let hyper = OptimStep {
            max_grad_norm: 1.0,
            ..HYPER
        };
        let norm = optimizer.step(&mut params, &mut grads, &hyper).unwrap();
        assert_eq!(norm, 4.0);
        assert!(
            (optimizer.moments[&0].0[0] - 0.1).abs() < 1e-6,
            "the clipped gradient is 1"
        );
    }

    #[test]
    fn missing_and_broken_gradients_change_nothing() {
        let (mut params, mut grads) = one(1.0);
        let mut optimizer = AdamW::default();
        let error = optimizer.step(&mut params, &mut grads, &HYPER).unwrap_err();
        assert!(matches!(error, PolicyError::MissingGradient { name } if name == "w"));
        fill(&mut grads, &params, f32::NAN);
        let error = optimizer.step(&mut params, &mut grads, &HYPER).unwrap_err();
        assert!(matches!(error, PolicyError::NonFiniteGradient { name } if name == "w"));
        assert_eq!((params.data(0)[0], optimizer.steps), (1.0, 0));
    }

    #[test]
    fn optimizer_state_survives_export() {
        let (mut params, mut grads) = one(1.0);
        let mut first = AdamW::default();
        fill(&mut grads, &params, 0.5);
        first.step(&mut params, &mut grads, &HYPER).unwrap();
        let mut second = AdamW::default();
        second
            .import(&params, &first.export(&params).unwrap())
            .unwrap();
        assert_eq!(
            (second.steps, &second.moments),
            (first.steps, &first.moments)
        );
    }
}
