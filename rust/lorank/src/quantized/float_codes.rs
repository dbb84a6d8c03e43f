//! Values of 8-bit and 4-bit floating-point codes.
//!
//! Values are computed without branches and look-ups, so that loops vectorise. The bits of exponent and mantissa
//! are moved into the place that they have in float32. A constant then corrects the bias of the exponent. For
//! codes with exponent 0, the hidden bit is subtracted. No intermediate number is subnormal, because
//! subnormals are slow.

// Measured without forced inlining: loops stay outside of the functions that are compiled for wide vectors.
#![allow(clippy::inline_always)]

/// Returns the value of an `E4M3` code ("fn" variant).
#[inline(always)]
pub(crate) fn e4m3(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f) << 20;
    let normal = f32::from_bits(magnitude + (120 << 23));
    let subnormal = f32::from_bits(magnitude + (121 << 23)) - 1.0 / 64.0;
    let finite = if magnitude < 1 << 23 { subnormal } else { normal };
    let value = if magnitude == 0x7f << 20 { f32::NAN } else { finite };
    f32::from_bits(value.to_bits() | u32::from(code & 0x80) << 24)
}

/// Returns the value of an `E5M2` code: the upper half of a float16.
#[inline(always)]
pub(crate) fn e5m2(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f) << 21;
    let normal = f32::from_bits(magnitude + (112 << 23));
    let subnormal = f32::from_bits(magnitude + (113 << 23)) - 1.0 / 16384.0;
    let finite = if magnitude < 1 << 23 { subnormal } else { normal };
    let special = f32::from_bits(magnitude | 0x7f80_0000);
    let value = if magnitude >= 0x7c << 21 { special } else { finite };
    f32::from_bits(value.to_bits() | u32::from(code & 0x80) << 24)
}

/// Returns the value of an `E2M1` code, which is less than 16.
#[inline(always)]
pub(crate) fn e2m1(code: u8) -> f32 {
    let magnitude = u32::from(code & 7) << 22;
    let normal = f32::from_bits(magnitude + (126 << 23));
    let subnormal = f32::from_bits(magnitude + (127 << 23)) - 1.0;
    let value = if magnitude < 1 << 23 { subnormal } else { normal };
    f32::from_bits(value.to_bits() | u32::from(code & 8) << 28)
}

/// Returns the values of the two codes of every byte: that of the high four bits first.
pub(crate) const fn pairs(values: &[f32; 16]) -> [[f32; 2]; 256] {
    let mut table = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        let (low, high) = (values[byte & 15], values[byte >> 4]);
        table[byte] = [high, low];
        byte += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn eight_bit_codes_have_the_values_of_their_fields() {
        for code in 0..=u8::MAX {
            let sign = if code >= 128 { -1.0 } else { 1.0 };
            let (e, m) = (i32::from(code >> 3 & 15), f64::from(code & 7));
            let expected = match (e, code & 7) {
                (15, 7) => f64::NAN,
                (0, _) => sign * m / 512.0,
                _ => sign * 2f64.powi(e - 7) * (1.0 + m / 8.0),
            };
            let found = f64::from(e4m3(code));
            assert!(
                found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()),
                "{code:#x}"
            );
            let (found, expected) = (e5m2(code), f16::from_bits(u16::from(code) << 8).to_f32());
            assert!(
                found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()),
                "{code:#x}"
            );
        }
    }

    #[test]
    fn four_bit_codes_have_the_values_of_the_format() {
        let magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0f32];
        for (code, value) in (0..8).zip(magnitudes) {
            assert_eq!([e2m1(code), e2m1(code + 8)].map(f32::to_bits), [value, -value].map(f32::to_bits));
        }
    }
}
