//! Rounding float64 to the types that files hold, once.

use half::{bf16, f16};

use crate::matrix::dtype::DType;

/// Whether no exponent is all ones.
pub(crate) fn all_finite(bytes: &[u8], dtype: DType) -> bool {
    // In blocks without an early exit within, so that the loop vectorises.
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

/// Appends one element, rounded once; whether it is finite before and after.
pub(crate) fn encode(x: f64, dtype: DType, out: &mut Vec<u8>) -> bool {
    #[allow(clippy::cast_possible_truncation)] // Rounding is the point.
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

/// Float32 with a last bit of 1 wherever it is not exact: rounding that to a type with at least two
/// bits less gives what rounding `x` itself would, where rounding twice would not.
#[allow(clippy::cast_possible_truncation)]
fn to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let is_exact = f64::from(nearest).to_bits() == x.to_bits();
    if is_exact || !nearest.is_finite() || nearest.to_bits() & 1 == 1 {
        return nearest;
    }
    // Even and inexact: the odd neighbour on the other side of `x`.
    let away_from_zero = f64::from(nearest).abs() < x.abs();
    f32::from_bits(if away_from_zero { nearest.to_bits() + 1 } else { nearest.to_bits() - 1 })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn halfway_cases_go_to_even_and_nothing_is_rounded_twice() {
        let encoded = |x: f64, dtype| {
            let mut out = Vec::new();
            assert!(encode(x, dtype, &mut out));
            u16::from_le_bytes([out[0], out[1]])
        };
        let ulp = 2f64.powi(-10); // of float16 at 1
        assert_eq!(encoded(1.0 + ulp / 2.0, DType::F16), f16::from_f32(1.0).to_bits());
        assert_eq!(encoded(1.0 + 1.5 * ulp, DType::F16), f16::from_f64(1.0 + 2.0 * ulp).to_bits());
        // Just above halfway, by less than float32 shows: rounded by way of float32 it would fall to 1.
        assert_eq!(encoded(1.0 + ulp / 2.0 + 1e-12, DType::F16), f16::from_f32(1.0).to_bits() + 1);
        assert_eq!(encoded(1.0 + ulp / 2.0 - 1e-12, DType::F16), f16::from_f32(1.0).to_bits());
        let ulp = 2f64.powi(-7);
        assert_eq!(encoded(1.0 + ulp / 2.0 + 1e-12, DType::Bf16), bf16::from_f32(1.0).to_bits() + 1);
        assert_eq!(encoded(2f64.powi(-25) * (1.0 + 1e-12), DType::F16), 1, "the smallest subnormal");
    }

    /// `x` rounded to a type of so many bits after the point and exponents from `least` to `most`, or
    /// `None` if it overflows. In units of the last place at `x`, where scaling by powers of two is
    /// exact, that is rounding to an integer.
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
            dtype.decode(&bytes, 1.0, &mut got);
            let expected = nearest(x, format);
            assert_eq!(fits, expected.is_some(), "{x:e} {dtype:?}");
            if let Some(expected) = expected {
                assert_eq!(got[0].to_bits(), expected.to_bits(), "{x:e} {dtype:?}: {} {expected}", got[0]);
            }
        }
    }

    /// Every finite half, every halfway point, and the float64 next to each on either side.
    #[test]
    fn every_boundary_of_the_narrow_types() {
        for bits in 0..u16::MAX {
            for dtype in [DType::F16, DType::Bf16] {
                let mut pair = [0.0f64; 2];
                dtype.decode(&[bits.to_le_bytes(), (bits + 1).to_le_bytes()].concat(), 1.0, &mut pair);
                let [low, high] = pair;
                if !low.is_finite() {
                    continue;
                }
                // Past the largest, halfway to where the next one would be is where overflow begins.
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

    /// Cases in which float32 hides on which side of a halfway point the value is.
    #[test]
    fn the_oracle_tells_double_rounding_apart() {
        for (dtype, format) in &TYPES[1..] {
            let x = 1.0 + 2f64.powi(-format.0 - 1) + 2f64.powi(-40);
            #[allow(clippy::cast_possible_truncation)]
            let twice = nearest(f64::from(x as f32), *format);
            assert_ne!(nearest(x, *format), twice, "{dtype:?}");
            check_rounding(x);
        }
    }

    #[test]
    fn nothing_special_is_written() {
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
