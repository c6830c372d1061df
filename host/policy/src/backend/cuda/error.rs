//! What can go wrong on the way to a CUDA GPU.

use cudarc::{
    cublaslt::{result::CublasError, sys::cublasStatus_t},
    driver::{DriverError, sys::CUresult},
};

/// See the file header.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    #[error("CUDA library `{0}` was not found")]
    Library(&'static str),
    #[error("no CUDA device {ordinal}: there are {count}")]
    NoDevice { ordinal: usize, count: usize },
    #[error("GPU `{name}` has compute capability {major}.{minor}; 8.0 or later is needed")]
    TooOld {
        name: String,
        major: i32,
        minor: i32,
    },
    #[error(
        "the NVIDIA driver is made for CUDA {}.{}; 12.4 or later is needed",
        version / 1000,
        version % 1000 / 10
    )]
    OldDriver {
        /// As 1000·major + 10·minor.
        version: i32,
    },
    #[error(
        "the model needs {} MiB on the GPU (weights {} MiB, workspace {} MiB) and {} MiB are left there",
        (weights + workspace) >> 20,
        weights >> 20,
        workspace >> 20,
        left >> 20
    )]
    TooBig {
        /// Bytes, as are the other two.
        weights: usize,
        workspace: usize,
        left: usize,
    },
    #[error(
        "training needs {} MiB on the GPU (optimizer and gradients {} MiB, passes of {tokens} tokens {} MiB) and {} MiB are left there",
        (state + activations) >> 20,
        state >> 20,
        activations >> 20,
        left >> 20
    )]
    TrainingTooBig {
        /// Bytes, as are the next and the last.
        state: usize,
        activations: usize,
        tokens: usize,
        left: usize,
    },
    #[error(
        "one sequence of {tokens} tokens needs {} MiB of KV cache and {} MiB are left on the GPU",
        needed >> 20,
        left >> 20
    )]
    OneSequence {
        tokens: usize,
        /// Bytes, as is the other.
        needed: usize,
        left: usize,
    },
    #[error("the GPU is out of memory")]
    OutOfMemory,
    #[error("the kernels were compiled by a later CUDA than the driver knows")]
    LaterKernels,
    #[error("kernel file {name} does not compile: {log}")]
    Compile { name: String, log: String },
    #[error("cublasLt has no algorithm for [{tokens}, {inputs}] × [{inputs}, {outputs}]")]
    NoAlgorithm {
        tokens: usize,
        outputs: usize,
        inputs: usize,
    },
    #[error("a step of {asked} {what} is too large; at most {most}")]
    Capacity {
        what: &'static str,
        asked: usize,
        most: usize,
    },
    #[error("the CUDA backend cannot run this model: {0}")]
    Shape(String),
    #[error("{0} is not done on a GPU yet")]
    NotYet(&'static str),
    #[error("weights that stay quantised do not train; LoRA beside them does")]
    StaysQuantized,
    #[error("adapters cannot be merged into weights that stay quantised")]
    MergeQuantized,
    #[error("the deterministic mode needs adapters that are merged into the weights")]
    UnmergedDeterministic,
    #[error("CUDA driver: {0}")]
    Driver(#[source] DriverError),
    #[error("gpus is {asked}, and from cuda:{first} on there are {found}")]
    TooFewGpus {
        asked: usize,
        /// Index of the first one asked for.
        first: usize,
        found: usize,
    },
    #[error("NCCL: {0}")]
    Nccl(String),
    #[error("cublasLt: {0}")]
    Blas(#[source] CublasError),
}

impl From<DriverError> for CudaError {
    fn from(error: DriverError) -> Self {
        match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Self::OutOfMemory,
            CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => Self::LaterKernels,
            _ => Self::Driver(error),
        }
    }
}

impl From<CublasError> for CudaError {
    fn from(error: CublasError) -> Self {
        match error.0 {
            cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => Self::OutOfMemory,
            _ => Self::Blas(error),
        }
    }
}

impl CudaError {
    /// Whether another device would do: something is wrong with this one, not with what is asked of any.
    pub fn is_of_the_device(&self) -> bool {
        !matches!(
            self,
            Self::Capacity { .. }
                | Self::StaysQuantized
                | Self::MergeQuantized
                | Self::UnmergedDeterministic
        )
    }

    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Library("cuda") => {
                "install the NVIDIA driver, or use --device cpu".to_owned()
            }
            Self::Library("nccl") => "several GPUs need NCCL: install it (also from PyPI: nvidia-nccl-cu13 with its lib folder on LD_LIBRARY_PATH), or use --gpus 1".to_owned(),
            Self::TooFewGpus { found: 0, .. } => "leave --gpus out, or use another --device".to_owned(),
            Self::TooFewGpus { found, .. } => format!("use --gpus {found} or fewer"),
            Self::Nccl(_) => "NCCL_DEBUG=WARN in the environment has it say more; --gpus 1 needs none of it".to_owned(),
            Self::Library(_) => "install CUDA 12.4 or later (its libraries nvrtc and cublas are enough, also from PyPI: nvidia-cuda-nvrtc and nvidia-cublas with their lib folders on LD_LIBRARY_PATH)".to_owned(),
            Self::NoDevice { count: 0, .. } | Self::TooOld { .. } | Self::Shape(_) | Self::NotYet(_) => "use --device cpu".to_owned(),
            Self::OldDriver { .. } => {
                "install a later NVIDIA driver (550 or later), or use --device cpu".to_owned()
            }
            Self::TooBig { .. } => {
                "raise gpu_memory_utilization, lower max_batch_size, or use --device cpu".to_owned()
            }
            Self::TrainingTooBig { .. } => {
                "lower micro_batch_tokens, leave gradient_checkpointing on, train with lora, or raise gpu_memory_utilization".to_owned()
            }
            Self::StaysQuantized => "set lora, or use --quantized-weights dequantize".to_owned(),
            Self::MergeQuantized => {
                "leave lora.merge out, or use --quantized-weights dequantize".to_owned()
            }
            Self::UnmergedDeterministic => {
                "set lora.merge to true and --quantized-weights to dequantize, or leave --deterministic out".to_owned()
            }
            Self::Capacity { what: "tokens", .. } => "lower micro_batch_tokens".to_owned(),
            Self::OneSequence { .. } => {
                "lower max_completion_length or max_prompt_length, or raise gpu_memory_utilization"
                    .to_owned()
            }
            Self::OutOfMemory => {
                "lower gpu_memory_utilization or max_batch_size, or end what else runs on the GPU"
                    .to_owned()
            }
            Self::LaterKernels => {
                "install NVRTC of the CUDA version that `grpo-host doctor` gives for the driver and delete grpo-host/kernels in the cache, or install a later driver".to_owned()
            }
            Self::Capacity {
                what: "sequences", ..
            } => "decode fewer at once: lower max_batch_size, or --prompts and --n of a benchmark"
                .to_owned(),
            Self::NoDevice { count: 1, .. } => "use --device cuda:0".to_owned(),
            Self::NoDevice { count, .. } => format!("use --device cuda:0 to cuda:{}", count - 1),
            Self::Driver(_) => {
                "`nvidia-smi` says whether the driver works; --device cpu needs none".to_owned()
            }
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_driver_says_of_memory_and_kernels_comes_with_a_hint() {
        let of_driver = |status| CudaError::from(DriverError(status));
        let full = of_driver(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        let blas = CublasError(cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED);
        for error in [full, blas.into()] {
            assert_eq!(error.to_string(), "the GPU is out of memory");
            assert!(error.hint().unwrap().contains("gpu_memory_utilization"));
            assert!(error.is_of_the_device());
        }
        let kernels = of_driver(CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
        assert!(kernels.hint().unwrap().contains("NVRTC"), "{kernels}");
    }

    #[test]
    fn only_the_gpus_that_are_there_are_offered() {
        for (count, hint) in [
            (0, "use --device cpu"),
            (1, "use --device cuda:0"),
            (4, "use --device cuda:0 to cuda:3"),
        ] {
            let error = CudaError::NoDevice { ordinal: 7, count };
            assert_eq!(error.hint().unwrap(), hint);
        }
    }
}
