//! The decoder: which weight is used where, one layer forward and backward. Attention itself is passed
//! in, because rollouts read a paged pool and training reads the batch.

use super::{
    attention::{Attended, Gradients, Heads, Packed},
    head::Head,
    linear::Linear,
    mat::Mat,
    ops::{self, Rope},
    params::{Grads, ParamId, Params},
};
use crate::types::Span;

/// Weights of one layer. Names follow the checkpoint's (`q_proj`, `gate_proj`, …).
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) input_layernorm: ParamId,
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) o_proj: Linear,
    /// Per-head norms of q and k (Qwen3).
    pub(crate) qk_norm: Option<(ParamId, ParamId)>,
    pub(crate) post_attention_layernorm: ParamId,
    pub(crate) gate_proj: Linear,
    pub(crate) up_proj: Linear,
    pub(crate) down_proj: Linear,
}

/// The whole network.
#[derive(Debug)]
pub(crate) struct Decoder {
    pub(crate) embed_tokens: ParamId,
    pub(crate) layers: Vec<Layer>,
    pub(crate) head: Head,
    pub(crate) rope: Rope,
    pub(crate) heads: Heads,
    pub(crate) eps: f32,
}

/// What stays the same over the layers of one pass.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub(crate) decoder: &'a Decoder,
    pub(crate) params: &'a Params,
    /// Position of each token in its sequence, `[T]`.
    pub(crate) positions: &'a [usize],
    /// LoRA on (policy) or off (reference).
    pub(crate) adapters: bool,
}

/// Queries, keys and values after norms and rotation, and q, k before them where a norm needs it.
pub(crate) struct Projected {
    pub(crate) q: Mat,
    pub(crate) k: Mat,
    pub(crate) v: Mat,
    before_norm: Option<(Mat, Mat)>,
}

/// Activations of one layer that its backward pass reads; norms and products of two are made again.
pub(crate) struct Trace {
    projected: Projected,
    attended: Attended,
    /// Residual stream between attention and MLP.
    middle: Mat,
    gate: Mat,
    up: Mat,
}

impl Decoder {
    /// Token embeddings, `[T, hidden]`.
    pub(crate) fn embed(&self, params: &Params, ids: &[u32]) -> Mat {
        super::head::gather(
            params.mat(self.embed_tokens),
            ids.iter().map(|id| *id as usize),
        )
    }
}

impl Layer {
    pub(crate) fn project(&self, pass: &Pass<'_>, x: &Mat) -> Projected {
        let Pass {
            decoder,
            params,
            positions,
            adapters,
        } = *pass;
        let h = ops::rms_norm(x, params.data(self.input_layernorm), decoder.eps);
        let mut q = self.q_proj.forward(params, &h, adapters);
        let mut k = self.k_proj.forward(params, &h, adapters);
        let v = self.v_proj.forward(params, &h, adapters);
        let mut before_norm = None;
        if let Some((q_norm, k_norm)) = self.qk_norm {
            let normed_q = ops::rms_norm(&q, params.data(q_norm), decoder.eps);
            let normed_k = ops::rms_norm(&k, params.data(k_norm), decoder.eps);
            before_norm = Some((q, k));
            (q, k) = (normed_q, normed_k);
        }
        decoder.rope.apply(&mut q, positions);
        decoder.rope.apply(&mut k, positions);
        Projected {
            q,
            k,
            v,
            before_norm,
        }
    }

    /// Residual stream after attention, given the attention result.
    pub(crate) fn join(&self, pass: &Pass<'_>, x: &Mat, attended: &Mat) -> Mat {
        let mut middle = self.o_proj.forward(pass.params, attended, pass.adapters);
        middle.add_assign(x);
        middle
    }

    /// Gate, up and the residual stream after the MLP.
    pub(crate) fn mlp(&self, pass: &Pass<'_>, middle: &Mat) -> (Mat, Mat, Mat) {
        let Pass {
            decoder,
            params,
            adapters,
            ..
        } = *pass;
        let h = ops::rms_norm(
            middle,
            params.data(self.post_attention_layernorm),
            decoder.eps,
        );
        let gate = self.gate_proj.forward(params, &h, adapters);
        let up = self.up_proj.forward(params, &h, adapters);
        let mut out = self
            .down_proj
            .forward(params, &ops::silu_mul(&gate, &up), adapters);
        out.add_assign(middle);
        (gate, up, out)
    }

    /// One layer over packed sequences; the trace is what [`Layer::backward`] wants.
    pub(crate) fn forward(&self, pass: &Pass<'_>, spans: &[Span], x: &Mat) -> (Mat, Trace) {
        let projected = self.project(pass, x);
        let attended = packed(pass, &projected, spans).forward();
        let middle = self.join(pass, x, &attended.out);
        let (gate, up, out) = self.mlp(pass, &middle);
        (
            out,
            Trace {
                projected,
                attended,
                middle,
                gate,
                up,
            },
        )
    }

    /// Gradient of the layer's input given that of its output.
    pub(crate) fn backward(
        &self,
        pass: &Pass<'_>,
        (x, trace): (&Mat, &Trace),
        spans: &[Span],
        dout: Mat,
        grads: &mut Grads,
    ) -> Mat {
        let dmiddle = self.mlp_backward(pass, trace, dout, grads);
        let (params, attended) = (pass.params, &trace.attended);
        let dattended = self.o_proj.backward(params, &attended.out, &dmiddle, grads);
        let batch = packed(pass, &trace.projected, spans);
        let gradients = batch.backward(attended, &dattended);
        self.project_backward(pass, (x, &trace.projected), gradients, dmiddle, grads)
    }

    fn mlp_backward(&self, pass: &Pass<'_>, trace: &Trace, dout: Mat, grads: &mut Grads) -> Mat {
        let Pass {
            decoder, params, ..
        } = *pass;
        let norm = self.post_attention_layernorm;
        let act = ops::silu_mul(&trace.gate, &trace.up);
        let dact = self.down_proj.backward(params, &act, &dout, grads);
        let (dgate, dup) = ops::silu_mul_backward(&trace.gate, &trace.up, &dact);
        let h = ops::rms_norm(&trace.middle, params.data(norm), decoder.eps);
        let mut dh = self.gate_proj.backward(params, &h, &dgate, grads);
        dh.add_assign(&self.up_proj.backward(params, &h, &dup, grads));
        let mut dmiddle = norm_backward(pass, norm, &trace.middle, &dh, grads);
        dmiddle.add_assign(&dout);
        dmiddle
    }

    fn project_backward(
        &self,
        pass: &Pass<'_>,
        (x, projected): (&Mat, &Projected),
        Gradients { mut dq, mut dk, dv }: Gradients,
        dresidual: Mat,
        grads: &mut Grads,
    ) -> Mat {
        let Pass {
            decoder,
            params,
            positions,
            ..
        } = *pass;
        decoder.rope.apply_backward(&mut dq, positions);
        decoder.rope.apply_backward(&mut dk, positions);
        if let (Some((q_norm, k_norm)), Some((q, k))) = (self.qk_norm, &projected.before_norm) {
            dq = norm_backward(pass, q_norm, q, &dq, grads);
            dk = norm_backward(pass, k_norm, k, &dk, grads);
        }
        let h = ops::rms_norm(x, params.data(self.input_layernorm), decoder.eps);
        let mut dh = self.q_proj.backward(params, &h, &dq, grads);
        dh.add_assign(&self.k_proj.backward(params, &h, &dk, grads));
        dh.add_assign(&self.v_proj.backward(params, &h, &dv, grads));
        let mut dx = norm_backward(pass, self.input_layernorm, x, &dh, grads);
        dx.add_assign(&dresidual);
        dx
    }
}

fn norm_backward(pass: &Pass<'_>, norm: ParamId, x: &Mat, dy: &Mat, grads: &mut Grads) -> Mat {
    let params = pass.params;
    let dweight = params
        .trainable(norm)
        .then(|| grads.slot(norm, params).data_mut());
    ops::rms_norm_backward(x, params.data(norm), pass.decoder.eps, dy, dweight)
}

fn packed<'a>(pass: &Pass<'_>, projected: &'a Projected, spans: &'a [Span]) -> Packed<'a> {
    let Projected { q, k, v, .. } = projected;
    Packed {
        q,
        k,
        v,
        spans,
        heads: pass.decoder.heads,
    }
}
