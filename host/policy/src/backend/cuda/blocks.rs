//! Quantised weights as the kernels read them (quantized.cu): GGUF's blocks of 32 with the scale beside, not in, the numbers.
//!
//! A weight is d·q + m. Four bits hold q of Q4_0 (whose q − 8 goes into m) and Q4_1; eight bits hold that of all formats
//! with blocks of 32, as q + 128. Others are not kept: the K formats have scales of scales, which nobody reads here.

use candle_core::quantized::GgmlDType;
use half::f16;
use rayon::prelude::*;

use crate::{
    error::PolicyError,
    weights::{Quantized, QuantizedMatrix},
};

/// Weights that share a scale.
pub(super) const BLOCK: usize = 32;

/// Width of a quantised weight on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Bits {
    Four,
    Eight,
}

impl Bits {
    /// The narrowest that holds all of the matrices `names`, which lie one below the other; `None` where one of them is
    /// not quantised or cannot be kept so.
    pub(super) fn of(quantized: &Quantized, names: &[&str]) -> Option<Self> {
        use GgmlDType::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
        let bits = |name: &&str| match quantized.get(*name)?.format() {
            Q4_0 | Q4_1 => Some(Self::Four),
            Q5_0 | Q5_1 | Q8_0 => Some(Self::Eight),
            _ => None,
        };
        let all: Vec<Self> = names.iter().map(bits).collect::<Option<_>>()?;
        Some(match all.contains(&Self::Eight) {
            true => Self::Eight,
            false => Self::Four,
        })
    }

    /// Bytes of a block's numbers.
    pub(super) fn block_bytes(self) -> usize {
        match self {
            Self::Four => 16,
            Self::Eight => 32,
        }
    }
}

/// Blocks in the kernels' order.
#[derive(Debug, Default)]
pub(super) struct Packed {
    /// Of each block, q of weight i in bits `bits·i` and up.
    pub(super) quants: Vec<u8>,
    /// Of each block d, and m above it, both f16.
    pub(super) scales: Vec<u32>,
}

impl Packed {
    /// Appends the rows of a matrix. Values are kept exactly.
    ///
    /// # Errors
    /// [`PolicyError::Misuse`] for a format that [`Bits::of`] refuses.
    pub(super) fn push(&mut self, matrix: &QuantizedMatrix, bits: Bits) -> Result<(), PolicyError> {
        let format = matrix.format();
        let zero = zero_of(format).ok_or(PolicyError::Misuse("no blocks of 32 weights"))?;
        let bytes = matrix.bytes()?;
        let count = bytes.len() / format.type_size();
        let (quants, scales) = (self.quants.len(), self.scales.len());
        self.quants.resize(quants + count * bits.block_bytes(), 0);
        self.scales.resize(scales + count, 0);
        self.quants[quants..]
            .par_chunks_mut(bits.block_bytes())
            .zip(&mut self.scales[scales..])
            .zip(bytes.par_chunks(format.type_size()))
            .with_min_len(4096)
            .for_each(|((quants, scale), block)| {
                let (d, m, q) = block_of(format, block);
                let m = match bits {
                    // Exact: a power of two. Beyond the range of f16 are only weights that bf16 models do not have; they
                    // become infinite, which is reported when logits are.
                    Bits::Four => f16::from_f32(m.to_f32() - d.to_f32() * f32::from(zero)),
                    Bits::Eight => m,
                };
                *scale = u32::from(d.to_bits()) | u32::from(m.to_bits()) << 16;
                match bits {
                    Bits::Four => {
                        for (byte, pair) in quants.iter_mut().zip(q.chunks_exact(2)) {
                            *byte = pair[0] | pair[1] << 4;
                        }
                    }
                    Bits::Eight => {
                        for (byte, q) in quants.iter_mut().zip(q) {
                            *byte = q + (128 - zero);
                        }
                    }
                }
            });
        Ok(())
    }
}

/// What is subtracted from q in a format; `None` for one that is not kept.
fn zero_of(format: GgmlDType) -> Option<u8> {
    Some(match format {
        GgmlDType::Q4_0 => 8,
        GgmlDType::Q5_0 => 16,
        GgmlDType::Q8_0 => 128,
        GgmlDType::Q4_1 | GgmlDType::Q5_1 => 0,
        _ => return None,
    })
}

/// Scale, minimum and numbers of a block of GGML's (ggml-common.h): d, m of the `_1` formats, fifth bits, then 4 bits of the
/// weights i and i + 16 together, or a signed byte each.
fn block_of(format: GgmlDType, block: &[u8]) -> (f16, f16, [u8; BLOCK]) {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]);
    let (mut at, mut m) = (2, f16::ZERO);
    if matches!(format, GgmlDType::Q4_1 | GgmlDType::Q5_1) {
        (at, m) = (4, half(2));
    }
    let mut q = [0; BLOCK];
    if format == GgmlDType::Q8_0 {
        for (q, byte) in q.iter_mut().zip(&block[at..]) {
            *q = byte ^ 0x80;
        }
        return (half(0), m, q);
    }
    let mut fifth = 0;
    if matches!(format, GgmlDType::Q5_0 | GgmlDType::Q5_1) {
        fifth = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
        at += 4;
    }
    for (i, q) in q.iter_mut().enumerate() {
        let low = block[at + i % 16] >> (4 * (i / 16)) & 15;
        *q = low | ((fifth >> i & 1) as u8) << 4;
    }
    (half(0), m, q)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMATS: [GgmlDType; 5] = [
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
    ];

    /// Bytes of every value, with scales that are finite and of either sign.
    fn matrix(format: GgmlDType, rows: usize, columns: usize) -> QuantizedMatrix {
        let blocks = rows * columns / BLOCK;
        let mut bytes: Vec<u8> = (0..blocks * format.type_size())
            .map(|i| (i * 151 + i / 255 * 7 + 11) as u8)
            .collect();
        for (i, block) in bytes.chunks_exact_mut(format.type_size()).enumerate() {
            let d = f16::from_f32((i as f32 * 0.37).sin() * 0.02);
            block[..2].copy_from_slice(&d.to_le_bytes());
            if matches!(format, GgmlDType::Q4_1 | GgmlDType::Q5_1) {
                let m = f16::from_f32((i as f32 * 1.7).cos() * 0.13);
                block[2..4].copy_from_slice(&m.to_le_bytes());
            }
        }
        QuantizedMatrix::from_bytes(format, (rows, columns), &bytes).unwrap()
    }

    /// d·q + m.
    fn values(packed: &Packed, bits: Bits) -> Vec<f32> {
        let value = |(i, scale): (usize, &u32)| {
            let part = |bits: u32| f16::from_bits(bits as u16).to_f32();
            let (d, m) = (part(*scale), part(scale >> 16));
            let quants = &packed.quants[i * bits.block_bytes()..][..bits.block_bytes()];
            (0..BLOCK).map(move |j| {
                let q = match bits {
                    Bits::Four => f32::from(quants[j / 2] >> (4 * (j % 2)) & 15),
                    Bits::Eight => f32::from(quants[j]) - 128.0,
                };
                d.mul_add(q, m)
            })
        };
        packed.scales.iter().enumerate().flat_map(value).collect()
    }

    #[test]
    fn every_value_of_every_format_is_kept() {
        for format in FORMATS {
            let stored = matrix(format, 48, 96);
            let dense = stored.dequantize().unwrap().flatten_all().unwrap();
            let expected: Vec<f32> = dense.to_vec1().unwrap();
            let quantized = Quantized::from([("w".to_owned(), stored.clone())]);
            let narrowest = Bits::of(&quantized, &["w"]).unwrap();
            for bits in [narrowest, Bits::Eight] {
                let mut packed = Packed::default();
                packed.push(&stored, bits).unwrap();
                assert_eq!(values(&packed, bits), expected, "{format:?} {bits:?}");
            }
        }
    }

    /// quantized.cu's arithmetic: weight `i` of a block.
    fn as_computed(bits: Bits, (d, m): (f32, f32), q: u8, i: usize) -> f32 {
        let added = match bits {
            Bits::Four if [0, 2, 3, 5].contains(&(i % 8)) => 2048.0,
            Bits::Four => 128.0,
            Bits::Eight => 32768.0,
        };
        let zero = if bits == Bits::Eight { 128.0 } else { 0.0 };
        d.mul_add(f32::from(q) + added, (-added - zero).mul_add(d, m))
    }

    #[test]
    fn the_arithmetic_of_the_kernels_is_as_near_as_they_say() {
        let half = |x: f32| f16::from_f32(x).to_f32();
        for (bits, most) in [(Bits::Four, 15), (Bits::Eight, 255)] {
            for step in 0..4000 {
                let d = half((step as f32 * 0.37).sin() * 0.02);
                let m = half(d * ((step % 97) as f32 / 3.0 - 16.0));
                for q in 0..=most {
                    let zero = if bits == Bits::Eight { 128.0 } else { 0.0 };
                    let exact = f64::from(d) * (f64::from(q) - zero) + f64::from(m);
                    let w = as_computed(bits, (d, m), q, usize::from(q));
                    let apart = (f64::from(w) - exact).abs();
                    // Rounded once, to f32.
                    let rounded = exact.abs() * f64::from(f32::EPSILON) / 2.0;
                    let allowed = match m == 0.0 || m.abs() >= 4.0 * d.abs() {
                        true => rounded,
                        false => rounded + f64::from(d.abs()) / 512.0,
                    };
                    assert!(apart <= allowed, "{bits:?} {d} {m} {q}: {w}, {exact}");
                }
            }
        }
    }

    #[test]
    fn matrices_lie_one_below_the_other() {
        let (first, second) = (
            matrix(GgmlDType::Q4_0, 16, 64),
            matrix(GgmlDType::Q8_0, 8, 64),
        );
        let mut packed = Packed::default();
        packed.push(&first, Bits::Eight).unwrap();
        packed.push(&second, Bits::Eight).unwrap();
        let all = |m: &QuantizedMatrix| -> Vec<f32> {
            let dense = m.dequantize().unwrap().flatten_all().unwrap();
            dense.to_vec1().unwrap()
        };
        let expected = [all(&first), all(&second)].concat();
        assert_eq!(values(&packed, Bits::Eight), expected);
    }

    #[test]
    fn the_narrowest_width_of_all_or_none() {
        let of = |format| matrix(format, 8, 32);
        let mut quantized = Quantized::from([
            ("a".to_owned(), of(GgmlDType::Q4_0)),
            ("b".to_owned(), of(GgmlDType::Q4_1)),
            ("c".to_owned(), of(GgmlDType::Q5_0)),
        ]);
        let k = candle_core::Tensor::zeros(
            (2, 256),
            candle_core::DType::F32,
            &candle_core::Device::Cpu,
        );
        let k = QuantizedMatrix::quantize(&k.unwrap(), GgmlDType::Q4K).unwrap();
        quantized.insert("k".to_owned(), k);
        let bits = |names: &[&str]| Bits::of(&quantized, names);
        assert_eq!(bits(&["a", "b"]), Some(Bits::Four));
        assert_eq!(bits(&["a", "b", "c"]), Some(Bits::Eight));
        assert_eq!(bits(&["a", "k"]), None);
        assert_eq!(bits(&["a", "dense"]), None);
        let mut packed = Packed::default();
        assert!(packed.push(&quantized["k"], Bits::Eight).is_err());
    }
}
