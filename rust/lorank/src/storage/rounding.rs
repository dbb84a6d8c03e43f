//! Rounding of float64 to the element types of files, in a single step.

// Measured without forced inlining: loops stay outside of the functions that are compiled for wide vectors.
#![allow(clippy::inline_always)]

use half::{bf16, f16};
use pulp::{Simd, WithSimd};

use crate::kernels::simd::dispatch;
use crate::matrix::dtype::DType;

/// Returns true if all elements are finite: no exponent consists of ones only.
pub(crate) fn all_finite(bytes: &[u8], dtype: DType) -> bool {
    // Early exits only between blocks, so that the loop over a block vectorises.
    fn none<const N: usize>(bytes: &[u8], is_special: impl Fn([u8; N]) -> bool) -> bool {
        let blocks = bytes.as_chunks::<N>().0.chunks(1024);
        blocks.into_iter().all(|block| !block.iter().fold(false, |any, &b| any | is_special(b)))
    }
    match dtype {
        DType::F64 => none::<8>(bytes, |b| !f64::from_le_bytes(b).is_finite()),
        DType::F32 => none::<4>(bytes, |b| !f32::from_le_bytes(b).is_finite()),
        DType::F16 => none::<2>(bytes, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        DType::Bf16 => none::<2>(bytes, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        DType::F8E4M3 | DType::F8E5M2 => false,
    }
}

/// Appends one element, rounded once. Returns true if it is finite before and after rounding.
pub(crate) fn encode(x: f64, dtype: DType, out: &mut Vec<u8>) -> bool {
    #[allow(clippy::cast_possible_truncation)] // Rounding is intended.
    match dtype {
        DType::F64 => {
            out.extend_from_slice(&x.to_le_bytes());
            x.is_finite()
        }
        DType::F32 => {
            let y = x as f32;
            out.extend_from_slice(&y.to_le_bytes());
            y.is_finite()
        }
        DType::F16 => {
            let y = f16::from_f32(to_odd(x));
            out.extend_from_slice(&y.to_le_bytes());
            y.is_finite()
        }
        DType::Bf16 => {
            let y = bf16::from_f32(to_odd(x));
            out.extend_from_slice(&y.to_le_bytes());
            y.is_finite()
        }
        DType::F8E4M3 | DType::F8E5M2 => false,
    }
}

/// Writes elements to all of `out`, each rounded as by [`encode`]. Returns true if all are finite before and
/// after rounding.
///
/// # Panics
/// Panics unless `out` has the size of as many elements.
pub(crate) fn encode_all(values: &[f64], dtype: DType, out: &mut [u8]) -> bool {
    assert_eq!(out.len(), values.len() * dtype.size(), "one place per element");
    dispatch(Encode { values, dtype, out })
}

struct Encode<'a> {
    values: &'a [f64],
    dtype: DType,
    out: &'a mut [u8],
}

impl WithSimd for Encode<'_> {
    type Output = bool;

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)] // Rounding is intended.
    #[allow(clippy::needless_bitwise_bool)] // Without branches, so that loops vectorise.
    fn with_simd<S: Simd>(self, _: S) -> bool {
        let Self { values, dtype, out } = self;
        match dtype {
            DType::F64 => rounded(values, out, |x| (x.to_le_bytes(), x.is_finite())),
            DType::F32 => rounded(values, out, |x| ((x as f32).to_le_bytes(), (x as f32).is_finite())),
            DType::F16 => rounded(values, out, |x| {
                let y = f16::from_f32(to_odd(x));
                (y.to_le_bytes(), y.is_finite())
            }),
            DType::Bf16 => rounded(values, out, |x| {
                let bits = to_odd(x).to_bits();
                // Half of the last place that stays, less one in the last bit of all if the result is even.
                let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
                ((nearest as u16).to_le_bytes(), x.is_finite() & (nearest & 0x7f80 != 0x7f80))
            }),
            DType::F8E4M3 | DType::F8E5M2 => false,
        }
    }
}

#[inline(always)]
fn rounded<const N: usize>(values: &[f64], out: &mut [u8], round: impl Fn(f64) -> ([u8; N], bool)) -> bool {
    let mut all = true;
    for (place, x) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        let (bytes, is_finite) = round(*x);
        *place = bytes;
        all &= is_finite;
    }
    all
}

/// Rounds to odd: returns a float32 whose last bit is 1 unless the conversion is exact. Rounding the result
/// to a type with at least two fewer bits equals rounding `x` directly. Rounding to nearest twice would not.
#[inline(always)]
#[allow(clippy::cast_possible_truncation)]
#[allow(clippy::needless_bitwise_bool)] // Without branches, so that loops vectorise.
fn to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let bits = nearest.to_bits();
    let is_exact = f64::from(nearest).to_bits() == x.to_bits();
    // Even and inexact: the odd neighbour on the other side of `x`.
    let away_from_zero = f64::from(nearest).abs() < x.abs();
    let neighbour = if away_from_zero { bits.wrapping_add(1) } else { bits.wrapping_sub(1) };
    let keeps = is_exact | !nearest.is_finite() | (bits & 1 == 1);
    f32::from_bits(if keeps { bits } else { neighbour })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn halfway_cases_round_to_even_in_a_single_step() {
        let encoded = |x: f64, dtype| {
            let mut out = Vec::new();
            assert!(encode(x, dtype, &mut out));
            u16::from_le_bytes([out[0], out[1]])
        };
        let ulp = 2f64.powi(-10); // of float16 at 1
        assert_eq!(encoded(1.0 + ulp / 2.0, DType::F16), f16::from_f32(1.0).to_bits());
        assert_eq!(encoded(1.0 + 1.5 * ulp, DType::F16), f16::from_f64(1.0 + 2.0 * ulp).to_bits());
        // Just above halfway, by less than the precision of float32: rounding twice would give 1.
        assert_eq!(encoded(1.0 + ulp / 2.0 + 1e-12, DType::F16), f16::from_f32(1.0).to_bits() + 1);
        assert_eq!(encoded(1.0 + ulp / 2.0 - 1e-12, DType::F16), f16::from_f32(1.0).to_bits());
        let ulp = 2f64.powi(-7);
        assert_eq!(encoded(1.0 + ulp / 2.0 + 1e-12, DType::Bf16), bf16::from_f32(1.0).to_bits() + 1);
        assert_eq!(encoded(2f64.powi(-25) * (1.0 + 1e-12), DType::F16), 1, "the smallest subnormal");
    }

    /// Rounds `x` to a type with `mantissa` bits after the point and exponents from `least` to `most`, or
    /// returns `None` on overflow. In units of the last place, to which scaling is exact, this is rounding to
    /// an integer.
    fn nearest(x: f64, (mantissa, least, most): (i32, i32, i32)) -> Option<f64> {
        let exponent = (i32::try_from(x.abs().to_bits() >> 52).unwrap() - 1023).max(least);
        let unit = 2f64.powi(exponent - mantissa);
        let rounded = (x / unit).round_ties_even() * unit;
        (rounded.abs() < 2f64.powi(most) * 2.0).then_some(rounded)
    }

    const TYPES: [(DType, (i32, i32, i32)); 3] =
        [(DType::F32, (23, -126, 127)), (DType::F16, (10, -14, 15)), (DType::Bf16, (7, -126, 127))];

    fn check_rounding(x: f64) {
        for (dtype, format) in TYPES {
            let mut bytes = Vec::new();
            let mut got = [0.0f64];
            let fits = encode(x, dtype, &mut bytes);
            let mut many = vec![0; 9 * bytes.len()];
            assert_eq!(encode_all(&[x; 9], dtype, &mut many), fits, "{x:e} {dtype:?}");
            assert_eq!(many, bytes.repeat(9), "{x:e} {dtype:?}");
            dtype.decode(&bytes, 1.0, &mut got);
            let expected = nearest(x, format);
            assert_eq!(fits, expected.is_some(), "{x:e} {dtype:?}");
            if let Some(expected) = expected {
                assert_eq!(got[0].to_bits(), expected.to_bits(), "{x:e} {dtype:?}: {} {expected}", got[0]);
            }
        }
    }

    /// Checks every finite half, every halfway point, and both float64 neighbours of each.
    #[test]
    fn rounding_is_right_at_every_boundary_of_16_bit_types() {
        for bits in 0..u16::MAX {
            for dtype in [DType::F16, DType::Bf16] {
                let mut pair = [0.0f64; 2];
                dtype.decode(&[bits.to_le_bytes(), (bits + 1).to_le_bytes()].concat(), 1.0, &mut pair);
                let [low, high] = pair;
                if !low.is_finite() {
                    continue;
                }
                // Overflow begins halfway between the largest number and its virtual successor.
                let step = if high.is_finite() { high - low } else { low - before(dtype, bits) };
                for x in [low, low + step / 2.0] {
                    for y in [x, x.next_up(), x.next_down()] {
                        check_rounding(y);
                    }
                }
            }
        }
        for x in [f64::from(f32::MAX), f64::MAX, f64::MIN_POSITIVE, 5e-324, 2f64.powi(-150), 0.0, -0.0] {
            for y in [x, x.next_up(), x.next_down(), -x] {
                if y.is_finite() {
                    check_rounding(y);
                }
            }
        }
        let halfway = f64::from(f32::MAX) + 2f64.powi(103);
        for x in [halfway, halfway.next_down(), -halfway, -halfway.next_down()] {
            check_rounding(x);
        }
    }

    fn before(dtype: DType, bits: u16) -> f64 {
        let mut value = [0.0];
        dtype.decode(&(bits - 1).to_le_bytes(), 1.0, &mut value);
        value[0]
    }

    /// Checks cases in which float32 hides the side of a halfway point on which the value lies.
    #[test]
    fn oracle_detects_double_rounding() {
        for (dtype, format) in &TYPES[1..] {
            let x = 1.0 + 2f64.powi(-format.0 - 1) + 2f64.powi(-40);
            #[allow(clippy::cast_possible_truncation)]
            let twice = nearest(f64::from(x as f32), *format);
            assert_ne!(nearest(x, *format), twice, "{dtype:?}");
            check_rounding(x);
        }
    }

    #[test]
    fn non_finite_values_are_rejected() {
        for x in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for dtype in [DType::F64, DType::F32, DType::F16, DType::Bf16] {
                assert!(!encode(x, dtype, &mut Vec::new()));
            }
        }
    }

    proptest! {
        #[test]
        fn any_value_is_rounded_once(x in prop_oneof![
            prop::num::f64::NORMAL | prop::num::f64::SUBNORMAL | prop::num::f64::ZERO,
            -70000f64..70000.0, -1e-6f64..1e-6, -1e-37f64..1e-37, -4e38f64..4e38])
        {
            check_rounding(x);
        }
    }
}
