//! Decoding of stored elements to float64 or float32.
//!
//! Elements are decoded from little-endian bytes of any alignment and owner. The conversion to float64 is
//! exact for every supported type.

// Measured without forced inlining: loops stay outside of the functions that are compiled for wide vectors.
#![allow(clippy::inline_always)]

use half::f16;
use pulp::{Simd, WithSimd};

use crate::kernels::number::Number;
use crate::kernels::simd::dispatch;
use crate::matrix::dtype::DType;

impl DType {
    /// Returns the type of stored elements that are numbers of type `T`.
    pub(crate) const fn of<T: Number>() -> Self {
        if size_of::<T>() == size_of::<f64>() { Self::F64 } else { Self::F32 }
    }

    /// Decodes `out.len()` consecutive elements. Each is multiplied by `scale` in float64 and rounded to `T`.
    ///
    /// # Panics
    /// Panics unless `bytes` contains exactly `out.len()` elements.
    pub(crate) fn decode<T: Number>(self, bytes: &[u8], scale: f64, out: &mut [T]) {
        assert_eq!(bytes.len(), out.len() * self.size(), "one element per output");
        dispatch(Decode { dtype: self, bytes, scale, out });
    }

    /// Returns the largest absolute value of consecutive elements, 0 if there are none. The result is
    /// infinite or NaN if an element is.
    pub(crate) fn largest(self, bytes: &[u8]) -> f64 {
        dispatch(Largest { dtype: self, bytes })
    }
}

struct Decode<'a, T> {
    dtype: DType,
    bytes: &'a [u8],
    scale: f64,
    out: &'a mut [T],
}

impl<T: Number> WithSimd for Decode<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { dtype, bytes, scale, out } = self;
        let is_plain = scale.to_bits() == 1f64.to_bits();
        match dtype {
            // Without float64 in between, which would take at least twice the time.
            DType::F32 if is_plain => widen(bytes, out, |b| T::of_f32(f32::from_le_bytes(b))),
            DType::F16 if is_plain => widen(bytes, out, |b| T::of_f32(f16_to_f32(u16::from_le_bytes(b)))),
            DType::Bf16 if is_plain => widen(bytes, out, |b| T::of_f32(bf16_to_f32(u16::from_le_bytes(b)))),
            DType::F64 => widen(bytes, out, |b| T::of(f64::from_le_bytes(b) * scale)),
            DType::F32 => widen(bytes, out, |b| T::of(f64::from(f32::from_le_bytes(b)) * scale)),
            DType::F16 => widen(bytes, out, |b| T::of(f64::from(f16_to_f32(u16::from_le_bytes(b))) * scale)),
            DType::Bf16 => {
                widen(bytes, out, |b| T::of(f64::from(bf16_to_f32(u16::from_le_bytes(b))) * scale));
            }
            DType::F8E4M3 => widen(bytes, out, |[b]| T::of(f64::from(E4M3[usize::from(b)]) * scale)),
            DType::F8E5M2 => widen(bytes, out, |[b]| T::of(f64::from(E5M2[usize::from(b)]) * scale)),
        }
    }
}

struct Largest<'a> {
    dtype: DType,
    bytes: &'a [u8],
}

impl WithSimd for Largest<'_> {
    type Output = f64;

    /// Compares elements as integers: without their sign bits, floating-point numbers have the order of their
    /// bits, with infinities and NaN above all others.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        let Self { dtype, bytes } = self;
        let eight = |bits: u64| bits.to_le_bytes();
        let bits = match dtype.size() {
            8 => eight(largest_of(bytes, |b| u64::from_le_bytes(b) & (u64::MAX >> 1))),
            4 => eight(largest_of(bytes, |b| u32::from_le_bytes(b) & (u32::MAX >> 1)).into()),
            2 => eight(largest_of(bytes, |b| u16::from_le_bytes(b) & (u16::MAX >> 1)).into()),
            _ => eight(largest_of(bytes, |[b]| b & (u8::MAX >> 1)).into()),
        };
        let mut value = [0.0];
        dtype.decode(&bits[..dtype.size()], 1.0, &mut value);
        value[0]
    }
}

#[inline(always)]
fn largest_of<B: Ord + Default, const N: usize>(bytes: &[u8], magnitude: impl Fn([u8; N]) -> B) -> B {
    let (elements, _) = bytes.as_chunks::<N>();
    elements.iter().fold(B::default(), |largest, &b| largest.max(magnitude(b)))
}

#[inline(always)]
fn widen<T: Number, const N: usize>(bytes: &[u8], out: &mut [T], decode: impl Fn([u8; N]) -> T) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (x, &b) in out.iter_mut().zip(elements) {
        *x = decode(b);
    }
}

/// Converts exactly and without a branch, so that a loop over it vectorises.
///
/// The bits of exponent and mantissa are moved into place. Multiplication by 2^112 then corrects the bias of
/// the exponent and normalises subnormals, exactly. Only infinities and NaNs need another exponent.
#[inline]
fn f16_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let finite = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    let special = f32::from_bits(magnitude | 0x7f80_0000);
    let value = if magnitude >= 0x7c00 << 13 { special } else { finite };
    f32::from_bits(value.to_bits() | u32::from(bits & 0x8000) << 16)
}

#[inline]
fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

static E4M3: [f32; 256] = e4m3_table();
static E5M2: [f32; 256] = e5m2_table();

/// Tabulates `(-1)^s * 2^(e-7) * (1 + m/8)`, with subnormals `(-1)^s * 2^-6 * m/8` and NaN at `S.1111.111`.
const fn e4m3_table() -> [f32; 256] {
    let mut table = [0.0f32; 256];
    let mut code = 0u16;
    while code < 256 {
        let exponent = (code >> 3) & 15;
        let mantissa = code & 7;
        let magnitude = if exponent == 15 && mantissa == 7 {
            f32::NAN
        } else if exponent == 0 {
            mantissa as f32 / 512.0
        } else {
            // 2^(e-10) as a float32, times the integer mantissa with its hidden bit.
            f32::from_bits((exponent as u32 + 117) << 23) * (8 + mantissa) as f32
        };
        table[code as usize] = if code >= 128 { -magnitude } else { magnitude };
        code += 1;
    }
    table
}

const fn e5m2_table() -> [f32; 256] {
    let mut table = [0.0f32; 256];
    let mut code = 0u16;
    while code < 256 {
        table[code as usize] = f16::from_bits(code << 8).to_f32_const();
        code += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::simd::tests::on_every_path;

    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
    }

    #[test]
    fn halves_decode_as_in_the_half_crate() {
        for bits in 0..=u16::MAX {
            assert!(same(f16_to_f32(bits), f16::from_bits(bits).to_f32()), "f16 {bits:#06x}");
            assert!(same(bf16_to_f32(bits), half::bf16::from_bits(bits).to_f32()), "bf16 {bits:#06x}");
        }
    }

    #[test]
    fn largest_magnitude_of_every_type() {
        // -3, 0.5, 1, infinity (E4M3 has none), NaN.
        let codes = |dtype, numbers: [f64; 5]| -> [Vec<u8>; 5] {
            #[allow(clippy::cast_possible_truncation)]
            numbers.map(|x| match dtype {
                DType::F64 => x.to_le_bytes().to_vec(),
                DType::F32 => (x as f32).to_le_bytes().to_vec(),
                DType::F16 => f16::from_f64(x).to_le_bytes().to_vec(),
                _ => half::bf16::from_f64(x).to_le_bytes().to_vec(),
            })
        };
        let numbers = [-3.0, 0.5, 1.0, f64::INFINITY, f64::NAN];
        let wide =
            [DType::F64, DType::F32, DType::F16, DType::Bf16].map(|dtype| (dtype, codes(dtype, numbers)));
        let narrow = [
            (DType::F8E4M3, [0xc4, 0x30, 0x38, 0x7f, 0xff].map(|code| vec![code])),
            (DType::F8E5M2, [0xc2, 0x38, 0x3c, 0x7c, 0xff].map(|code| vec![code])),
        ];
        on_every_path(|path| {
            for (dtype, [three, half, one, infinity, nan]) in wide.iter().chain(&narrow) {
                assert!(dtype.largest(&[]).to_bits() == 0, "{path:?} {dtype:?}");
                let mut bytes = half.repeat(70);
                bytes.extend_from_slice(three);
                bytes.extend(one.repeat(13));
                assert!((dtype.largest(&bytes) - 3.0).abs() < f64::EPSILON, "{path:?} {dtype:?}");
                for (bad, place) in [(infinity, 0), (infinity, 80), (nan, 3), (nan, 83)] {
                    let mut bytes = bytes.clone();
                    bytes[place * dtype.size()..][..dtype.size()].copy_from_slice(bad);
                    assert!(!dtype.largest(&bytes).is_finite(), "{path:?} {dtype:?} {place}");
                }
            }
        });
    }

    #[test]
    fn fp8_types_decode_their_landmarks() {
        // Landmarks of the formats: smallest subnormal, one, largest, NaN (and infinity for E5M2).
        for (code, value) in
            [(0x01, 2f32.powi(-9)), (0x38, 1.0), (0x7e, 448.0), (0xfe, -448.0), (0x08, 2f32.powi(-6))]
        {
            assert!(same(E4M3[code], value), "{code:#x}");
        }
        assert!(E4M3[0x7f].is_nan() && E4M3[0xff].is_nan());
        for (code, value) in [(0x01, 2f32.powi(-16)), (0x3c, 1.0), (0x7b, 57344.0), (0x7c, f32::INFINITY)] {
            assert!(same(E5M2[code], value), "{code:#x}");
        }
        assert!(E5M2[0x7d].is_nan());
    }

    #[test]
    fn decode_scales() {
        let bytes: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut out = [0.0; 2];
        DType::F32.decode(&bytes, 4.0, &mut out);
        assert_eq!(out.map(f64::to_bits), [6.0f64, -8.0].map(f64::to_bits));
    }
}
