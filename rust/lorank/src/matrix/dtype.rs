//! Element types of stored tensors, and their names.

/// The floating-point types whose matrices have spectra in this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary64.
    F64,
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    Bf16,
    /// FP8 E4M3 ("fn" variant: no infinities, one NaN pattern per sign).
    F8E4M3,
    /// FP8 E5M2: the upper half of a binary16.
    F8E5M2,
}

impl DType {
    /// Returns the number of bytes of an element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4M3 | Self::F8E5M2 => 1,
        }
    }

    /// Returns the type that a safetensors header names, or `None` for types without a spectrum (integers,
    /// booleans, complex numbers, packed formats).
    #[must_use]
    pub fn from_safetensors(name: &str) -> Option<Self> {
        Some(match name {
            "F64" => Self::F64,
            "F32" => Self::F32,
            "F16" => Self::F16,
            "BF16" => Self::Bf16,
            "F8_E4M3" => Self::F8E4M3,
            "F8_E5M2" => Self::F8E5M2,
            _ => return None,
        })
    }

    /// Returns the name that `NumPy`, torch and lorank's reports use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F64 => "float64",
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::F8E4M3 => "float8_e4m3fn",
            Self::F8E5M2 => "float8_e5m2",
        }
    }

    /// Returns the type with a given [`name`](Self::name).
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::F64, Self::F32, Self::F16, Self::Bf16, Self::F8E4M3, Self::F8E5M2]
            .into_iter()
            .find(|dtype| dtype.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for dtype in [DType::F64, DType::F32, DType::F16, DType::Bf16, DType::F8E4M3, DType::F8E5M2] {
            assert_eq!(DType::from_name(dtype.name()), Some(dtype));
        }
    }
}
