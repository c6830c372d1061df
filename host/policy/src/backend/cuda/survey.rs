//! What of CUDA this machine has, for people.

use cudarc::driver::{CudaContext, sys as driver};

use super::CudaError;

/// Libraries found, and GPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Each library this backend loads, whether it was found, and the PyPI package that brings it (none for the driver's).
    pub libraries: Vec<(&'static str, bool, Option<&'static str>)>,
    /// CUDA version of the driver, as 1000·major + 10·minor.
    pub driver: Option<i32>,
    pub gpus: Vec<GpuFacts>,
}

/// One GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuFacts {
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Bytes: free and all.
    pub memory: (usize, usize),
}

/// Looks, and changes nothing.
///
/// # Errors
/// What the driver says where it is installed and does not work.
pub fn survey() -> Result<Survey, CudaError> {
    // SAFETY: each opens and closes a shared library that has no side effects of its own.
    let (cuda, nvrtc, blas) = unsafe {
        (
            driver::is_culib_present(),
            cudarc::nvrtc::sys::is_culib_present(),
            cudarc::cublaslt::sys::is_culib_present(),
        )
    };
    let mut found = Survey {
        libraries: vec![
            ("cuda", cuda, None),
            ("nvrtc", nvrtc, Some("nvidia-cuda-nvrtc")),
            ("cublasLt", blas, Some("nvidia-cublas")),
        ],
        ..Survey::default()
    };
    if !cuda {
        return Ok(found);
    }
    cudarc::driver::result::init()?;
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { driver::cuDriverGetVersion(&raw mut version) }.result()?;
    found.driver = Some(version);
    for ordinal in 0..CudaContext::device_count()? as usize {
        let context = CudaContext::new(ordinal)?;
        found.gpus.push(GpuFacts {
            name: context.name()?,
            capability: context.compute_capability()?,
            memory: context.mem_get_info()?,
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_has_no_gpu() {
        let found = survey().unwrap();
        assert_eq!(found.libraries.len(), 3);
        if !found.libraries[0].1 {
            assert_eq!((found.driver, found.gpus.len()), (None, 0));
        }
    }
}
