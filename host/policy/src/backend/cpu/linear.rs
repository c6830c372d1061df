//! One projection: frozen or trained weight, optional bias, optional LoRA adapter.

use super::{
    mat::{Mat, View},
    ops,
    params::{Grads, ParamId, Params},
};

/// `y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ`, the last term being LoRA (Hu et al. 2021) with `s = alpha / r`.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    pub(crate) weight: ParamId,
    pub(crate) bias: Option<ParamId>,
    pub(crate) lora: Option<Lora>,
}

/// `a` is `[r, in]`, `b` is `[out, r]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lora {
    pub(crate) a: ParamId,
    pub(crate) b: ParamId,
    pub(crate) scale: f32,
}

impl Linear {
    /// `[T, in] → [T, out]`; `adapters` off gives the reference policy.
    pub(crate) fn forward(&self, params: &Params, x: &Mat, adapters: bool) -> Mat {
        let mut y = x.mul_t(params.mat(self.weight));
        if let Some(bias) = self.bias {
            ops::add_bias(&mut y, params.data(bias));
        }
        if let Some(lora) = self.lora.filter(|_| adapters) {
            let mut low = x.mul_t(params.mat(lora.a));
            scale(&mut low, lora.scale);
            y.add_assign(&low.mul_t(params.mat(lora.b)));
        }
        y
    }

    /// Gradient of the input; those of the weights that train are added to `grads`. No product is made
    /// for a frozen weight.
    pub(crate) fn backward(&self, params: &Params, x: &Mat, dy: &Mat, grads: &mut Grads) -> Mat {
        let mut dx = dy.mul(params.mat(self.weight));
        if params.trainable(self.weight) {
            grads.add_product(self.weight, View::whole(dy).t(), View::whole(x));
        }
        if let Some(bias) = self.bias.filter(|b| params.trainable(*b)) {
            ops::add_column_sums(dy, grads.slot(bias, params).data_mut());
        }
        if let Some(lora) = self.lora {
            let mut low = x.mul_t(params.mat(lora.a));
            scale(&mut low, lora.scale);
            grads.add_product(lora.b, View::whole(dy).t(), View::whole(&low));
            let mut dlow = dy.mul(params.mat(lora.b));
            scale(&mut dlow, lora.scale);
            grads.add_product(lora.a, View::whole(&dlow).t(), View::whole(x));
            dx.add_assign(&dlow.mul(params.mat(lora.a)));
        }
        dx
    }
}

fn scale(x: &mut Mat, by: f32) {
    x.data_mut().iter_mut().for_each(|v| *v *= by);
}
