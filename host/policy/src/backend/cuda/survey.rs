//! What of CUDA this machine has, for people.

use cudarc::driver::CudaContext;

use super::{CudaError, device, has_nccl};

/// The library that only several GPUs need.
const ONLY_FOR_SEVERAL: &str = "nccl";

/// Libraries found, and GPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Each library this backend loads, whether it was found, and the PyPI package that brings it (none for the driver's).
    /// [`ONLY_FOR_SEVERAL`] is not needed for one GPU.
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

impl Survey {
    /// Indices of the GPUs that a model can run on here.
    pub fn usable(&self) -> Vec<usize> {
        let mut needed = self.libraries.iter().filter(|l| l.0 != ONLY_FOR_SEVERAL);
        let complete = needed.all(|(_, found, _)| *found);
        let usable = |(ordinal, gpu): (usize, &GpuFacts)| {
            let driver = self.driver.filter(|_| complete)?;
            device::is_supported(driver, gpu.capability).then_some(ordinal)
        };
        self.gpus.iter().enumerate().filter_map(usable).collect()
    }
}

/// Looks, and changes nothing.
///
/// # Errors
/// What the driver says where it is installed and does not work.
pub fn survey() -> Result<Survey, CudaError> {
    let driver = device::driver_version()?;
    // SAFETY: each opens and closes a shared library that has no side effects of its own.
    let (nvrtc, blas) = unsafe {
        (
            cudarc::nvrtc::sys::is_culib_present(),
            cudarc::cublaslt::sys::is_culib_present(),
        )
    };
    let mut found = Survey {
        libraries: vec![
            ("cuda", driver.is_some(), None),
            ("nvrtc", nvrtc, Some("nvidia-cuda-nvrtc")),
            ("cublasLt", blas, Some("nvidia-cublas")),
            (ONLY_FOR_SEVERAL, has_nccl(), Some("nvidia-nccl-cu13")),
        ],
        driver,
        gpus: Vec::new(),
    };
    for ordinal in 0..device::count()? {
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
        assert_eq!(found.libraries.len(), 4);
        if !found.libraries[0].1 {
            assert_eq!((found.driver, found.gpus.len()), (None, 0));
        }
    }

    #[test]
    fn only_what_has_all_it_needs_is_usable() {
        let gpu = |capability| GpuFacts {
            name: "a GPU".to_owned(),
            capability,
            memory: (1, 2),
        };
        let survey = Survey {
            libraries: vec![
                ("cuda", true, None),
                ("cublasLt", true, None),
                (ONLY_FOR_SEVERAL, false, None),
            ],
            driver: Some(12_040),
            gpus: vec![gpu((7, 5)), gpu((8, 0)), gpu((9, 0))],
        };
        assert_eq!(survey.usable(), [1, 2]);
        let old = Survey {
            driver: Some(12_030),
            ..survey.clone()
        };
        assert!(old.usable().is_empty());
        let mut partial = survey;
        partial.libraries[1].1 = false;
        assert!(partial.usable().is_empty());
    }
}
