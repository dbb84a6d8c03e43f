//! Numbers of scales and zero points, which every library stores in its own type.

use half::{bf16, f16};

use crate::Result;
use crate::quantized::float_codes::e4m3;
use crate::quantized::request::Request;
use crate::storage::checkpoint::StoredTensor;

/// The element type of a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScaleType {
    F32,
    F16,
    Bf16,
    E4M3,
    /// A power of two; 255 is NaN.
    E8M0,
    /// A power of two in a plain byte; 255 is infinity, as in the libraries that store it so.
    Exponent,
}

impl ScaleType {
    /// Returns the type of a tensor of scales.
    pub(crate) fn of(request: &Request, tensor: &StoredTensor) -> Result<Self> {
        Ok(match tensor.info.dtype.as_str() {
            "F32" => Self::F32,
            "F16" => Self::F16,
            "BF16" => Self::Bf16,
            "F8_E4M3" => Self::E4M3,
            "F8_E8M0" => Self::E8M0,
            "U8" => Self::Exponent,
            other => return Err(request.refuse(tensor, format!("holds scales of type {other}"))),
        })
    }

    /// Returns the scale at a position, exactly.
    #[inline]
    pub(crate) fn at(self, bytes: &[u8], at: usize) -> f32 {
        let two = |at: usize| u16::from_le_bytes(bytes.as_chunks::<2>().0[at]);
        match self {
            Self::F32 => f32::from_le_bytes(bytes.as_chunks::<4>().0[at]),
            Self::F16 => f16::from_bits(two(at)).to_f32(),
            Self::Bf16 => bf16::from_bits(two(at)).to_f32(),
            Self::E4M3 => e4m3(bytes[at]),
            Self::E8M0 if bytes[at] == u8::MAX => f32::NAN,
            Self::E8M0 | Self::Exponent => exponent(bytes[at]),
        }
    }
}

/// Returns `2^(byte - 127)`.
fn exponent(byte: u8) -> f32 {
    // 2^-127 is subnormal, with the highest bit of the mantissa.
    f32::from_bits(if byte == 0 { 1 << 22 } else { u32::from(byte) << 23 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponents_are_powers_of_two() {
        for byte in 0..255u8 {
            let expected = 2f64.powi(i32::from(byte) - 127);
            assert!((f64::from(ScaleType::Exponent.at(&[byte], 0)) - expected).abs() == 0.0, "{byte}");
            assert!((f64::from(ScaleType::E8M0.at(&[byte], 0)) - expected).abs() == 0.0, "{byte}");
        }
        assert!(ScaleType::Exponent.at(&[255], 0).is_infinite());
        assert!(ScaleType::E8M0.at(&[255], 0).is_nan());
    }
}
