//! The GPU: its context, the one stream everything runs on, and the loaded kernels.

use std::{cell::Cell, path::Path, sync::Arc, time::Instant};

use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, DeviceRepr, DriverError, result,
    sys::{self, CUdevice_attribute as Attribute, CUfunction_attribute, CUresult},
};

use super::{
    CudaError, compile, parts::Filter, product::Products, quantized::QuantizedKernels,
    siblings::GroupKernels,
};

/// Loads kernel files, compiled unless they are in the folder `cache`.
pub(super) fn load(
    context: &Arc<CudaContext>,
    sources: &[(&str, &str)],
    cache: Option<&Path>,
) -> Result<Vec<Arc<CudaModule>>, CudaError> {
    let (major, minor) = context.compute_capability()?;
    let architecture = compile::architecture(major, minor);
    let load = |(name, source): &(&str, &str)| {
        let ptx = compile::cached(name, source, architecture, cache)?;
        Ok(context.load_module(ptx)?)
    };
    sources.iter().map(load).collect()
}

/// Shared memory that a block may ask for; every supported GPU has it.
pub(super) const SHARED_BYTES: usize = 96 << 10;

/// Of [`Gpu::memory_bandwidth`]: bytes of a copy, most and least; copies between two looks at the clock; tries.
const COPIED: usize = 1 << 30;
const LEAST_COPIED: usize = 256 << 20;
const COPIES: usize = 8;
const ROUNDS: usize = 5;

/// See the file header.
pub(super) struct Gpu {
    pub(super) stream: Arc<CudaStream>,
    pub(super) kernels: Kernels,
    pub(super) quantized: QuantizedKernels,
    /// On Hopper.
    pub(super) products: Option<Products>,
    pub(super) multiprocessors: usize,
    /// Knows programmatic dependent launch (Hopper and later).
    pub(super) overlaps: bool,
    pub(super) filter: Filter,
    /// The kernel queued last writes weights. Others read weights before the one before them has ended, so the next one has to
    /// wait for that.
    pub(super) wrote_weights: Cell<bool>,
}

/// Every kernel by its name in the source.
pub(super) struct Kernels {
    pub(super) embed: CudaFunction,
    pub(super) rms_norm: CudaFunction,
    /// The same for many rows of up to 1024 and 2048.
    pub(super) norm_rows: [CudaFunction; 2],
    pub(super) silu_mul: CudaFunction,
    pub(super) qkv_rope_cache: CudaFunction,
    pub(super) copy_blocks: CudaFunction,
    pub(super) embed_normed: CudaFunction,
    /// Of the model's head dimension.
    pub(super) attention: AttentionKernel,
    /// The same for sequences of one token, straight from the projection: few of them, and many.
    pub(super) decode_few: AttentionKernel,
    pub(super) decode_many: AttentionKernel,
    pub(super) decode_group: GroupKernels,
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

/// A kernel of attention.cu, whose number of warps is its own.
pub(super) struct AttentionKernel {
    pub(super) function: CudaFunction,
    pub(super) threads: u32,
    /// Bytes of a block.
    pub(super) shared: usize,
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
        // SAFETY: everything runs on one stream, so no buffer is used by two at the same time. The events would be
        // created at every allocation and cannot be captured.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        let architecture = compile::architecture(major, minor);
        let modules = load(&context, &compile::SOURCES, cache)?;
        let multiprocessors =
            context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let products = match architecture == "compute_90a" {
            true => Some(Products::load(&modules)?),
            false => None,
        };
        Ok(Self {
            kernels: Kernels::load(&context, &modules, head_dim)?,
            quantized: QuantizedKernels::load(&modules)?,
            products,
            multiprocessors,
            overlaps: major >= 9,
            filter: Filter::default(),
            wrote_weights: Cell::new(false),
            stream,
        })
    }

    /// Bytes per second that the memory moves: a copy within it, which reads and writes each byte, the fastest of some.
    /// Takes a quarter of what is free for it, up to 1 GiB, twice; `None` where that is so little that a cache would be
    /// measured.
    pub(super) fn memory_bandwidth(&self) -> Result<Option<f64>, CudaError> {
        let bytes = COPIED.min(self.memory()?.0 / 4);
        if bytes < LEAST_COPIED {
            return Ok(None);
        }
        let stream = &self.stream;
        let from = stream.alloc_zeros::<u8>(bytes)?;
        let mut to = stream.alloc_zeros::<u8>(bytes)?;
        let mut fastest = f64::INFINITY;
        for _ in 0..ROUNDS {
            stream.synchronize()?;
            let start = Instant::now();
            for _ in 0..COPIES {
                stream.memcpy_dtod(&from, &mut to)?;
            }
            stream.synchronize()?;
            fastest = fastest.min(start.elapsed().as_secs_f64());
        }
        drop((from, to));
        // What is freed in the stream's order goes back to the driver when somebody waits for it.
        stream.synchronize()?;
        Ok(Some((2 * bytes * COPIES) as f64 / fastest))
    }

    /// `n` numbers from an address, once everything before is done.
    pub(super) fn read<T: DeviceRepr + Default + Clone>(
        &self,
        at: u64,
        n: usize,
    ) -> Result<Vec<T>, CudaError> {
        let mut out = vec![T::default(); n];
        self.stream.context().bind_to_thread()?;
        // SAFETY: the caller names a live buffer of at least `n` numbers of this type, and `out` lives until the copy is done,
        // which is waited for.
        unsafe { result::memcpy_dtoh_async(&mut out, at, self.stream.cu_stream())? };
        self.stream.synchronize()?;
        Ok(out)
    }

    /// Numbers to an address.
    pub(super) fn write<T: DeviceRepr>(&self, at: u64, numbers: &[T]) -> Result<(), CudaError> {
        self.stream.context().bind_to_thread()?;
        // SAFETY: the caller names a live buffer of at least as many numbers of this type, and `numbers` lives until the copy
        // is done, which is waited for.
        unsafe { result::memcpy_htod_async(at, numbers, self.stream.cu_stream())? };
        Ok(self.stream.synchronize()?)
    }

    /// Queues a copy of bytes within the memory.
    pub(super) fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), CudaError> {
        self.stream.context().bind_to_thread()?;
        // SAFETY: the caller names live buffers of at least so many bytes that do not overlap.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream())? };
        Ok(())
    }

    /// Queues zeros to so many bytes.
    pub(super) fn zero(&self, at: u64, bytes: usize) -> Result<(), CudaError> {
        self.stream.context().bind_to_thread()?;
        // SAFETY: the caller names a live buffer of at least so many bytes.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream.cu_stream())? };
        Ok(())
    }

    /// Bytes of GPU memory: free, and all.
    pub(super) fn memory(&self) -> Result<(usize, usize), CudaError> {
        Ok(self.stream.context().mem_get_info()?)
    }
}

/// CUDA version of the oldest driver that is enough, as 1000·major + 10·minor.
const OLDEST_DRIVER: i32 = 12_040;

/// Compute capability of the oldest GPU that is enough: bf16 on tensor cores.
const OLDEST_MAJOR: i32 = 8;

/// Whether a driver and a compute capability are new enough.
pub(super) fn is_supported(driver: i32, (major, _minor): (i32, i32)) -> bool {
    driver >= OLDEST_DRIVER && major >= OLDEST_MAJOR
}

/// CUDA version of the driver, as 1000·major + 10·minor; `None` without a driver.
pub(super) fn driver_version() -> Result<Option<i32>, CudaError> {
    // SAFETY: opens and closes a shared library that has no side effects of its own.
    if !unsafe { sys::is_culib_present() } {
        return Ok(None);
    }
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    Ok(Some(version))
}

/// GPUs of this machine; none without a driver, or where the driver has none or is a placeholder to link against.
///
/// # Errors
/// What a driver that does not work says.
pub fn count() -> Result<usize, CudaError> {
    if driver_version()?.is_none() {
        return Ok(0);
    }
    match cudarc::driver::result::init() {
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE | CUresult::CUDA_ERROR_STUB_LIBRARY)) => {
            return Ok(0);
        }
        begun => begun?,
    }
    Ok(CudaContext::device_count()? as usize)
}

/// The context of GPU `ordinal`.
pub(super) fn context(ordinal: usize) -> Result<Arc<CudaContext>, CudaError> {
    let version = driver_version()?.ok_or(CudaError::Library("cuda"))?;
    if version < OLDEST_DRIVER {
        return Err(CudaError::OldDriver { version });
    }
    let count = count()?;
    if ordinal >= count {
        return Err(CudaError::NoDevice { ordinal, count });
    }
    let context = CudaContext::new(ordinal)?;
    let (major, minor) = context.compute_capability()?;
    if major < OLDEST_MAJOR {
        let name = context.name()?;
        return Err(CudaError::TooOld { name, major, minor });
    }
    Ok(context)
}

/// A kernel by its name.
pub(super) fn function(modules: &[Arc<CudaModule>], name: &str) -> Result<CudaFunction, CudaError> {
    let found = modules.iter().find_map(|m| m.load_function(name).ok());
    found.ok_or_else(|| CudaError::Shape(format!("there is no kernel `{name}`")))
}

/// The same, with up to `bytes` of dynamic shared memory for a block.
pub(super) fn roomy(
    modules: &[Arc<CudaModule>],
    name: &str,
    bytes: usize,
) -> Result<CudaFunction, CudaError> {
    let kernel = function(modules, name)?;
    kernel.set_attribute(
        CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        bytes as i32,
    )?;
    Ok(kernel)
}

impl Kernels {
    fn load(
        context: &Arc<CudaContext>,
        modules: &[Arc<CudaModule>],
        head_dim: usize,
    ) -> Result<Self, CudaError> {
        let get = |name: &str| function(modules, name);
        let roomy = |name: &str| roomy(modules, name, SHARED_BYTES);
        let attention = |kind: &str| -> Result<AttentionKernel, CudaError> {
            let name = format!("{kind}_{head_dim}");
            let threads = get(&name)?
                .get_attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?
                as u32;
            let shared = threads as usize / 32 * 64 * (head_dim + 2);
            Ok(AttentionKernel {
                function: self::roomy(modules, &name, shared)?,
                threads,
                shared,
            })
        };
        Ok(Self {
            embed: get("embed")?,
            rms_norm: get("rms_norm")?,
            norm_rows: [get("norm_rows_8")?, get("norm_rows_16")?],
            silu_mul: get("silu_mul")?,
            qkv_rope_cache: get("qkv_rope_cache")?,
            copy_blocks: get("copy_blocks")?,
            embed_normed: get("embed_normed")?,
            attention: attention("attention")?,
            decode_few: attention("decode_few")?,
            decode_many: attention("decode_many")?,
            decode_group: GroupKernels::load(context, modules, head_dim)?,
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
