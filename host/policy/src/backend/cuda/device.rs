//! The GPU: its context, the one stream everything runs on, and the loaded kernels.

use std::{path::Path, sync::Arc};

use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, sys::CUdevice_attribute as Attribute,
    sys::CUfunction_attribute,
};

use super::{CudaError, compile};

/// Shared memory that a block may ask for; every supported GPU has it.
const SHARED_BYTES: i32 = 96 << 10;

/// See the file header.
pub(super) struct Gpu {
    pub(super) stream: Arc<CudaStream>,
    pub(super) kernels: Kernels,
    pub(super) multiprocessors: usize,
    /// Knows programmatic dependent launch (Hopper and later).
    pub(super) overlaps: bool,
}

/// Every kernel by its name in the source.
pub(super) struct Kernels {
    pub(super) embed: CudaFunction,
    pub(super) rms_norm: CudaFunction,
    pub(super) silu_mul: CudaFunction,
    pub(super) qkv_rope_cache: CudaFunction,
    pub(super) copy_blocks: CudaFunction,
    /// Of the model's head dimension.
    pub(super) attention: CudaFunction,
    /// The same for sequences of one token, straight from the projection.
    pub(super) decode: CudaFunction,
    pub(super) attention_threads: u32,
    pub(super) skinny_qkv: CudaFunction,
    pub(super) skinny_add: CudaFunction,
    pub(super) skinny_swiglu: CudaFunction,
    pub(super) skinny_head: CudaFunction,
    pub(super) sum_chunks: CudaFunction,
    pub(super) sample: CudaFunction,
    pub(super) advance: CudaFunction,
    pub(super) survey_chunks: CudaFunction,
    pub(super) draw: CudaFunction,
}

impl Gpu {
    /// Opens GPU `ordinal` and compiles what is not in the folder `cache`, for heads of `head_dim`.
    pub(super) fn open(
        ordinal: usize,
        head_dim: usize,
        cache: Option<&Path>,
    ) -> Result<Self, CudaError> {
        let context = context(ordinal)?;
        let (major, minor) = context.compute_capability()?;
        if major < 8 {
            let name = context.name()?;
            return Err(CudaError::TooOld { name, major, minor });
        }
        // SAFETY: everything runs on one stream, so no buffer is used by two at the same time. The events would be
        // created at every allocation and cannot be captured.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        let architecture = compile::architecture(major, minor);
        let modules = compile::SOURCES
            .iter()
            .map(|(name, source)| {
                let ptx = compile::cached(name, source, architecture, cache)?;
                Ok(context.load_module(ptx)?)
            })
            .collect::<Result<Vec<_>, CudaError>>()?;
        let multiprocessors =
            context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        Ok(Self {
            kernels: Kernels::load(&modules, head_dim)?,
            multiprocessors,
            overlaps: major >= 9,
            stream,
        })
    }

    /// Bytes of GPU memory: free, and all.
    pub(super) fn memory(&self) -> Result<(usize, usize), CudaError> {
        Ok(self.stream.context().mem_get_info()?)
    }
}

/// The context of GPU `ordinal`.
pub(super) fn context(ordinal: usize) -> Result<Arc<CudaContext>, CudaError> {
    // SAFETY: opens and closes a shared library that has no side effects of its own.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err(CudaError::Library("cuda"));
    }
    cudarc::driver::result::init()?;
    let count = CudaContext::device_count()? as usize;
    if ordinal >= count {
        return Err(CudaError::NoDevice { ordinal, count });
    }
    Ok(CudaContext::new(ordinal)?)
}

impl Kernels {
    fn load(modules: &[Arc<CudaModule>], head_dim: usize) -> Result<Self, CudaError> {
        let get = |name: &str| -> Result<CudaFunction, CudaError> {
            let found = modules.iter().find_map(|m| m.load_function(name).ok());
            found.ok_or_else(|| CudaError::Shape(format!("there is no kernel `{name}`")))
        };
        let roomy = |name: &str| -> Result<CudaFunction, CudaError> {
            let kernel = get(name)?;
            kernel.set_attribute(
                CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                SHARED_BYTES,
            )?;
            Ok(kernel)
        };
        Ok(Self {
            embed: get("embed")?,
            rms_norm: get("rms_norm")?,
            silu_mul: get("silu_mul")?,
            qkv_rope_cache: get("qkv_rope_cache")?,
            copy_blocks: get("copy_blocks")?,
            attention: get(&format!("attention_{head_dim}"))?,
            decode: get(&format!("decode_{head_dim}"))?,
            // Wider heads leave registers and shared memory for half as many warps.
            attention_threads: if head_dim <= 64 { 256 } else { 128 },
            skinny_qkv: roomy("skinny_qkv")?,
            skinny_add: roomy("skinny_add")?,
            skinny_swiglu: roomy("skinny_swiglu")?,
            skinny_head: roomy("skinny_head")?,
            sum_chunks: get("sum_chunks")?,
            sample: get("sample")?,
            advance: get("advance")?,
            survey_chunks: get("survey_chunks")?,
            draw: roomy("draw")?,
        })
    }
}
