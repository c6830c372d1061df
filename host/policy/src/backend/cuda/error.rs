//! What can go wrong on the way to a CUDA GPU.

use cudarc::{cublaslt::result::CublasError, driver::DriverError};

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
    #[error("CUDA driver: {0}")]
    Driver(#[from] DriverError),
    #[error("cublasLt: {0}")]
    Blas(#[from] CublasError),
}

impl CudaError {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Library("cuda") => {
                "install the NVIDIA driver, or use --device cpu".to_owned()
            }
            Self::Library(_) => "install CUDA 12.4 or later (its libraries nvrtc and cublas are enough, also from PyPI: nvidia-cuda-nvrtc and nvidia-cublas with their lib folders on LD_LIBRARY_PATH)".to_owned(),
            Self::NoDevice { count: 0, .. } | Self::TooOld { .. } | Self::Shape(_) | Self::NotYet(_) => "use --device cpu".to_owned(),
            Self::NoDevice { count, .. } => format!("use --device cuda:0 to cuda:{}", count - 1),
            _ => return None,
        })
    }
}
