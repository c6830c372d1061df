//! Matrices as a file has quantised them: blocks of weights that share a scale, row by row. Who computes in f32 dequantises
//! them; a GPU may keep them (backend/cuda).

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QStorage, QTensor},
};

use crate::error::PolicyError;

/// Quantised matrices by Hugging Face name.
pub type Quantized = BTreeMap<String, QuantizedMatrix>;

/// `[rows, columns]` in one of GGUF's block formats. Clones share the bytes.
#[derive(Clone, Debug)]
pub struct QuantizedMatrix {
    blocks: Arc<QTensor>,
    rows: usize,
    columns: usize,
}

impl QuantizedMatrix {
    /// `None` for what is no matrix, or not in blocks: f32, f16 and bf16.
    pub(crate) fn new(blocks: QTensor) -> Option<Self> {
        let [rows, columns] = *blocks.shape().dims() else {
            return None;
        };
        let in_blocks = blocks.dtype().block_size() > 1;
        (in_blocks && rows > 0).then(|| Self {
            blocks: Arc::new(blocks),
            rows,
            columns,
        })
    }

    /// From the bytes of a GGUF file: `rows` rows of `columns / 32` blocks (`/ 256` for the K formats).
    ///
    /// # Errors
    /// [`PolicyError::Misuse`] where the bytes are not so many, or the format has no blocks.
    pub fn from_bytes(
        format: GgmlDType,
        (rows, columns): (usize, usize),
        bytes: &[u8],
    ) -> Result<Self, PolicyError> {
        let wrong = PolicyError::Misuse("the bytes of quantised weights are not whole blocks");
        let size = format.block_size();
        if !columns.is_multiple_of(size)
            || bytes.len() != rows * columns / size * format.type_size()
        {
            return Err(wrong);
        }
        let storage = QStorage::from_data(Cow::Borrowed(bytes), &Device::Cpu, format)?;
        Self::new(QTensor::new(storage, (rows, columns))?).ok_or(wrong)
    }

    /// The nearest that `format` can say of a `[rows, columns]` tensor, by GGML's reference quantiser.
    ///
    /// # Errors
    /// candle's, for a number of columns that the format does not divide.
    pub fn quantize(tensor: &Tensor, format: GgmlDType) -> Result<Self, PolicyError> {
        let wrong = PolicyError::Misuse("only matrices are quantised, in blocks");
        Self::new(QTensor::quantize(tensor, format)?).ok_or(wrong)
    }

    pub fn format(&self) -> GgmlDType {
        self.blocks.dtype()
    }

    /// Rows and columns.
    pub fn dims(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// The blocks of all rows, as a GGUF file has them.
    ///
    /// # Errors
    /// candle's.
    pub fn bytes(&self) -> Result<Cow<'_, [u8]>, PolicyError> {
        Ok(self.blocks.data()?)
    }

    /// f32, `[rows, columns]`.
    ///
    /// # Errors
    /// candle's.
    pub fn dequantize(&self) -> Result<Tensor, PolicyError> {
        Ok(self.blocks.dequantize(&Device::Cpu)?)
    }

    /// The same rows in another order: row `i` is `source(i)` of these.
    pub(crate) fn reordered(&self, source: impl Fn(usize) -> usize) -> Result<Self, PolicyError> {
        let bytes = self.bytes()?;
        let width = bytes.len() / self.rows;
        let rows = (0..self.rows).flat_map(|row| &bytes[source(row) * width..][..width]);
        let bytes: Vec<u8> = rows.copied().collect();
        Self::from_bytes(self.format(), (self.rows, self.columns), &bytes)
    }
}
