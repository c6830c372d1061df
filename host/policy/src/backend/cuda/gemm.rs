//! Products with weight matrices through cublasLt, with the algorithm of each shape chosen once.

use std::{collections::HashMap, ffi::c_void, ptr, sync::Arc, time::Instant};

use cudarc::{
    cublaslt::{result as lt, sys},
    driver::{CudaSlice, CudaStream, DevicePtr},
};

use super::CudaError;

/// cublasLt's recommendation for Hopper.
const WORKSPACE: usize = 32 << 20;

/// Algorithms tried by [`Gemm::tune`].
const CANDIDATES: usize = 24;

/// What becomes of the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Out {
    /// bf16, overwritten.
    Bf16,
    /// f32, overwritten.
    F32,
}

/// `y[tokens, outputs] = x[tokens, inputs] · w[outputs, inputs]ᵀ`; x and w are bf16, all row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) tokens: usize,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    /// From one token's outputs to the next one's in y, which may be wider.
    pub(super) stride: usize,
    pub(super) out: Out,
}

/// Device addresses of one product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operands {
    pub(super) w: u64,
    pub(super) x: u64,
    pub(super) y: u64,
}

/// Descriptors and algorithm of one shape.
struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    algo: sys::cublasLtMatmulAlgo_t,
    tuned: bool,
}

/// See the file header.
pub(super) struct Gemm {
    handle: sys::cublasLtHandle_t,
    stream: Arc<CudaStream>,
    workspace: CudaSlice<u8>,
    plans: HashMap<Shape, Plan>,
}

impl Gemm {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self, CudaError> {
        // SAFETY: opens and closes a shared library that has no side effects of its own.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::Library("cublasLt"));
        }
        Ok(Self {
            handle: lt::create_handle()?,
            stream: stream.clone(),
            workspace: stream.alloc_zeros(WORKSPACE)?,
            plans: HashMap::new(),
        })
    }

    /// Queues the product.
    pub(super) fn run(&mut self, shape: Shape, at: Operands) -> Result<(), CudaError> {
        if !self.plans.contains_key(&shape) {
            let plan = self.plan(shape)?;
            self.plans.insert(shape, plan);
        }
        let plan = &self.plans[&shape];
        self.launch(plan, &plan.algo, at)
    }

    /// Times the likely algorithms and keeps the fastest. It goes around `all`, which are several matrices of the shape,
    /// because one alone would come from the cache and a decoding step finds none there. Results are overwritten. Not to
    /// be called while a graph is captured.
    pub(super) fn tune(&mut self, shape: Shape, all: &[Operands]) -> Result<(), CudaError> {
        if self.plans.get(&shape).is_some_and(|plan| plan.tuned) {
            return Ok(());
        }
        let mut plan = self.plan(shape)?;
        let mut best = f64::INFINITY;
        for algo in self.candidates(&plan, CANDIDATES)? {
            // Some of what cublasLt proposes it then refuses to run.
            if self.launch(&plan, &algo, all[0]).is_err() {
                continue;
            }
            let seconds = self.time(&plan, &algo, all)?;
            if seconds < best {
                best = seconds;
                plan.algo = algo;
            }
        }
        plan.tuned = true;
        self.plans.insert(shape, plan);
        Ok(())
    }

    /// Seconds of one round over `all`, the faster of two. By the host's clock, which several products in a row make exact
    /// enough: the driver's event timer has another name in CUDA 12 than the one bound here.
    fn time(
        &self,
        plan: &Plan,
        algo: &sys::cublasLtMatmulAlgo_t,
        all: &[Operands],
    ) -> Result<f64, CudaError> {
        let mut fastest = f64::INFINITY;
        for _ in 0..2 {
            self.stream.synchronize()?;
            let start = Instant::now();
            for at in all {
                self.launch(plan, algo, *at)?;
            }
            self.stream.synchronize()?;
            fastest = fastest.min(start.elapsed().as_secs_f64());
        }
        Ok(fastest)
    }

    fn plan(&self, shape: Shape) -> Result<Plan, CudaError> {
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let Shape {
            tokens,
            outputs,
            inputs,
            stride,
            out,
        } = shape;
        let y_type = match out {
            Out::Bf16 => CUDA_R_16BF,
            Out::F32 => CUDA_R_32F,
        };
        let (m, n, k) = (outputs as u64, tokens as u64, inputs as u64);
        // cublasLt is column-major: it sees w as [inputs, outputs] to be transposed, x as [inputs, tokens] and y as
        // [outputs, tokens].
        let mut plan = Plan {
            desc: lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, CUDA_R_32F)?,
            w: lt::create_matrix_layout(CUDA_R_16BF, k, m, inputs as i64)?,
            x: lt::create_matrix_layout(CUDA_R_16BF, k, n, inputs as i64)?,
            y: lt::create_matrix_layout(y_type, m, n, stride as i64)?,
            algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            tuned: false,
        };
        // CUBLAS_OP_T.
        let transpose = 1i32;
        // SAFETY: `desc` is alive and the attribute is an int that is copied.
        unsafe {
            lt::set_matmul_desc_attribute(
                plan.desc,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                ptr::from_ref(&transpose).cast::<c_void>(),
                size_of_val(&transpose),
            )?;
        }
        plan.algo = *self
            .candidates(&plan, 1)?
            .first()
            .ok_or(CudaError::NoAlgorithm {
                tokens,
                outputs,
                inputs,
            })?;
        Ok(plan)
    }

    /// Algorithms by what cublasLt expects of them.
    fn candidates(
        &self,
        plan: &Plan,
        most: usize,
    ) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, CudaError> {
        let preference = lt::create_matmul_pref()?;
        let workspace = WORKSPACE;
        // All zeros is a valid value of this plain struct.
        // SAFETY: integers, a float and an enum whose first variant is 0.
        let empty: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        let mut found = vec![empty; most];
        let mut count = 0;
        // SAFETY: every descriptor is alive, and `found` has room for `most` results.
        let status = unsafe {
            lt::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                ptr::from_ref(&workspace).cast::<c_void>(),
                size_of_val(&workspace),
            )?;
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                plan.desc,
                plan.w,
                plan.x,
                plan.y,
                plan.y,
                preference,
                most as i32,
                found.as_mut_ptr(),
                &raw mut count,
            );
            lt::destroy_matmul_pref(preference)?;
            status
        };
        status.result()?;
        found.truncate(count as usize);
        Ok(found.into_iter().map(|result| result.algo).collect())
    }

    fn launch(
        &self,
        plan: &Plan,
        algo: &sys::cublasLtMatmulAlgo_t,
        at: Operands,
    ) -> Result<(), CudaError> {
        let alpha = 1f32;
        let beta = 0f32;
        let (workspace, _guard) = self.workspace.device_ptr(&self.stream);
        // SAFETY: the descriptors are alive; the caller's operands have the shapes of the plan; the workspace has
        // WORKSPACE bytes and is used by one stream only.
        unsafe {
            lt::matmul(
                self.handle,
                plan.desc,
                ptr::from_ref(&alpha).cast(),
                ptr::from_ref(&beta).cast(),
                at.w as *const c_void,
                plan.w,
                at.x as *const c_void,
                plan.x,
                at.y as *const c_void,
                plan.y,
                at.y as *mut c_void,
                plan.y,
                ptr::from_ref(algo),
                workspace as *mut c_void,
                WORKSPACE,
                self.stream.cu_stream().cast(),
            )?;
        }
        Ok(())
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        for plan in self.plans.values() {
            // SAFETY: each was made by `plan` and is destroyed once. A failure leaks some bytes at the end of the
            // process.
            unsafe {
                _ = lt::destroy_matmul_desc(plan.desc);
                for layout in [plan.w, plan.x, plan.y] {
                    _ = lt::destroy_matrix_layout(layout);
                }
            }
        }
        // SAFETY: made by `new`, destroyed once.
        _ = unsafe { lt::destroy_handle(self.handle) };
    }
}
