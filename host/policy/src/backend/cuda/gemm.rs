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

/// Plans that are kept: packed passes have another number of tokens every time.
const MOST_PLANS: usize = 4096;

/// What becomes of the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Out {
    /// bf16, overwritten.
    Bf16,
    /// f32, overwritten.
    F32,
    /// f32, added to.
    AddF32,
    /// bf16, added to: rounded twice.
    AddBf16,
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

impl Shape {
    fn product(self) -> Product {
        Product {
            rows: self.tokens,
            columns: self.outputs,
            inner: self.inputs,
            a: Factor::plain(self.inputs),
            b: Factor::transposed(self.inputs),
            stride: self.stride,
            numbers: Numbers::Bf16,
            out: self.out,
            alignment: ALIGNMENT,
        }
    }
}

/// Device addresses of one product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operands {
    pub(super) w: u64,
    pub(super) x: u64,
    pub(super) y: u64,
}

/// How a row-major factor of a product lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Factor {
    transposed: bool,
    /// Numbers from one of its rows, as they are stored, to the next.
    stride: usize,
}

impl Factor {
    /// Stored as it is multiplied.
    pub(super) fn plain(stride: usize) -> Self {
        let transposed = false;
        Self { transposed, stride }
    }

    /// Stored as its transpose.
    pub(super) fn transposed(stride: usize) -> Self {
        let transposed = true;
        Self { transposed, stride }
    }
}

/// What both factors are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Numbers {
    Bf16,
    F32,
}

/// `y[rows, columns] = scale · a[rows, inner] · b[inner, columns]`, all row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Product {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) inner: usize,
    pub(super) a: Factor,
    pub(super) b: Factor,
    /// Numbers from one row of y to the next.
    pub(super) stride: usize,
    pub(super) numbers: Numbers,
    pub(super) out: Out,
    /// Of the addresses, in bytes; set by [`Gemm::multiply`].
    pub(super) alignment: u32,
}

/// A product of bf16 to bf16 without gaps between rows.
pub(super) fn product(
    (rows, columns, inner): (usize, usize, usize),
    a: Factor,
    b: Factor,
) -> Product {
    Product {
        rows,
        columns,
        inner,
        a,
        b,
        stride: columns,
        numbers: Numbers::Bf16,
        out: Out::Bf16,
        alignment: 0,
    }
}

/// What cublasLt takes addresses for when nothing is said, in bytes: the alignment of whole buffers.
const ALIGNMENT: u32 = 256;

/// Largest power of two, up to [`ALIGNMENT`], that divides all addresses.
fn alignment(addresses: [u64; 3]) -> u32 {
    let [a, b, y] = addresses;
    1 << (a | b | y | u64::from(ALIGNMENT)).trailing_zeros()
}

/// Descriptors and algorithm of one shape.
struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    algo: sys::cublasLtMatmulAlgo_t,
    tuned: bool,
    /// Of y, what is kept.
    beta: f32,
    alignment: u32,
}

/// See the file header.
pub(super) struct Gemm {
    handle: sys::cublasLtHandle_t,
    stream: Arc<CudaStream>,
    workspace: CudaSlice<u8>,
    plans: HashMap<Product, Plan>,
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
        self.queue(shape.product(), 1.0, at)
    }

    /// Queues any product, of the factors at `a` and `b` to `y`. The algorithm is cublasLt's first choice, so that the same
    /// product gives the same bits in every process.
    pub(super) fn multiply(
        &mut self,
        product: Product,
        scale: f32,
        [a, b, y]: [u64; 3],
    ) -> Result<(), CudaError> {
        let alignment = alignment([a, b, y]);
        let product = Product {
            alignment,
            ..product
        };
        self.queue(product, scale, Operands { w: b, x: a, y })
    }

    fn queue(&mut self, product: Product, scale: f32, at: Operands) -> Result<(), CudaError> {
        if !self.plans.contains_key(&product) {
            if self.plans.len() >= MOST_PLANS {
                self.plans.retain(|_, plan| plan.tuned);
            }
            let plan = self.plan(product)?;
            self.plans.insert(product, plan);
        }
        let plan = &self.plans[&product];
        self.launch(plan, &plan.algo, scale, at)
    }

    /// Times the likely algorithms and keeps the fastest. It goes around `all`, which are several matrices of the shape,
    /// because one alone would come from the cache and a decoding step finds none there. Results are overwritten. Not to
    /// be called while a graph is captured.
    pub(super) fn tune(&mut self, shape: Shape, all: &[Operands]) -> Result<(), CudaError> {
        let product = shape.product();
        if self.plans.get(&product).is_some_and(|plan| plan.tuned) {
            return Ok(());
        }
        let mut plan = self.plan(product)?;
        let mut best = f64::INFINITY;
        for algo in self.candidates(&plan, CANDIDATES)? {
            // Some of what cublasLt proposes it then refuses to run.
            if self.launch(&plan, &algo, 1.0, all[0]).is_err() {
                continue;
            }
            let seconds = self.time(&plan, &algo, all)?;
            if seconds < best {
                best = seconds;
                plan.algo = algo;
            }
        }
        plan.tuned = true;
        self.plans.insert(product, plan);
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
                self.launch(plan, algo, 1.0, *at)?;
            }
            self.stream.synchronize()?;
            fastest = fastest.min(start.elapsed().as_secs_f64());
        }
        Ok(fastest)
    }

    fn plan(&self, product: Product) -> Result<Plan, CudaError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let from = match product.numbers {
            Numbers::Bf16 => CUDA_R_16BF,
            Numbers::F32 => CUDA_R_32F,
        };
        let to = match product.out {
            Out::Bf16 | Out::AddBf16 => CUDA_R_16BF,
            Out::F32 | Out::AddF32 => CUDA_R_32F,
        };
        let sizes = (product.rows, product.columns, product.inner);
        let (n, m, k) = (sizes.0 as u64, sizes.1 as u64, sizes.2 as u64);
        // cublasLt is column-major: it sees every matrix transposed, and so yᵀ = bᵀ · aᵀ.
        let layout = |kind, factor: Factor, rows, columns| {
            let (rows, columns) = match factor.transposed {
                true => (columns, rows),
                false => (rows, columns),
            };
            lt::create_matrix_layout(kind, rows, columns, factor.stride as i64)
        };
        let mut plan = Plan {
            desc: lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, CUDA_R_32F)?,
            w: layout(from, product.b, m, k)?,
            x: layout(from, product.a, k, n)?,
            y: lt::create_matrix_layout(to, m, n, product.stride as i64)?,
            algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            tuned: false,
            beta: match product.out {
                Out::Bf16 | Out::F32 => 0.0,
                Out::AddF32 | Out::AddBf16 => 1.0,
            },
            alignment: product.alignment,
        };
        for (factor, attribute) in [
            (product.b, Attribute::CUBLASLT_MATMUL_DESC_TRANSA),
            (product.a, Attribute::CUBLASLT_MATMUL_DESC_TRANSB),
        ] {
            // CUBLAS_OP_T and CUBLAS_OP_N.
            let operation = i32::from(factor.transposed);
            // SAFETY: `desc` is alive and the attribute is an int that is copied.
            unsafe {
                let value = ptr::from_ref(&operation).cast::<c_void>();
                lt::set_matmul_desc_attribute(plan.desc, attribute, value, size_of::<i32>())?;
            }
        }
        let (tokens, outputs, inputs) = sizes;
        let none = CudaError::NoAlgorithm {
            tokens,
            outputs,
            inputs,
        };
        plan.algo = *self.candidates(&plan, 1)?.first().ok_or(none)?;
        Ok(plan)
    }

    /// Algorithms by what cublasLt expects of them.
    fn candidates(
        &self,
        plan: &Plan,
        most: usize,
    ) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, CudaError> {
        let preference = lt::create_matmul_pref()?;
        let found = self.heuristic(plan, preference, most);
        // SAFETY: made above, destroyed once.
        unsafe { lt::destroy_matmul_pref(preference)? };
        found
    }

    fn heuristic(
        &self,
        plan: &Plan,
        preference: sys::cublasLtMatmulPreference_t,
        most: usize,
    ) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, CudaError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let (workspace, alignment) = (WORKSPACE, plan.alignment);
        let workspace = (
            ptr::from_ref(&workspace).cast::<c_void>(),
            size_of::<usize>(),
        );
        let alignment = (ptr::from_ref(&alignment).cast::<c_void>(), size_of::<u32>());
        // All zeros is a valid value of this plain struct.
        // SAFETY: integers, a float and an enum whose first variant is 0.
        let empty: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        let mut found = vec![empty; most];
        let mut count = 0;
        for (attribute, (value, bytes)) in [
            (
                Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                workspace,
            ),
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                alignment,
            ),
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                alignment,
            ),
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                alignment,
            ),
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                alignment,
            ),
        ] {
            // SAFETY: the preference is alive and the value is an integer of these bytes that is copied.
            unsafe { lt::set_matmul_pref_attribute(preference, attribute, value, bytes)? };
        }
        // SAFETY: every descriptor is alive, and `found` has room for `most` results.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
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
            )
        };
        status.result()?;
        found.truncate(count as usize);
        Ok(found.into_iter().map(|result| result.algo).collect())
    }

    fn launch(
        &self,
        plan: &Plan,
        algo: &sys::cublasLtMatmulAlgo_t,
        alpha: f32,
        at: Operands,
    ) -> Result<(), CudaError> {
        let beta = plan.beta;
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

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: each was made by `plan` and is destroyed once. A failure leaks some bytes.
        unsafe {
            _ = lt::destroy_matmul_desc(self.desc);
            for layout in [self.w, self.x, self.y] {
                _ = lt::destroy_matrix_layout(layout);
            }
        }
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        _ = unsafe { lt::destroy_handle(self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_as_aligned_as_the_least_of_them() {
        assert_eq!(alignment([0x1000, 0x2000, 0x3000]), 256);
        assert_eq!(alignment([0x1000, 0x2040, 0x3000]), 64);
        assert_eq!(alignment([0x1010, 0x2040, 0x3002]), 2);
    }
}
