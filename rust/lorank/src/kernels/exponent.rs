//! Exact scaling by powers of two, which brings tiny and huge matrices near 1.

use crate::{Error, Result};

/// Largest absolute value of a binary exponent for which sums of squares stay normal float64 numbers.
const EXPONENT_LIMIT: i32 = 480;

/// Returns the exponent `e` with `2^(e-1) <= x < 2^e`.
pub(crate) fn binary_exponent(x: f64) -> Result<i32> {
    // Taken from the bits, as the logarithm of a number just below a power of two may be rounded up.
    let exponent = ((x.to_bits() >> 52) & 0x7ff) as i32 - 1022;
    if exponent.abs() > EXPONENT_LIMIT {
        return Err(Error::Numerical(format!(
            "its largest absolute value is {x:e}: the squares leave the range of float64; rescale the matrix"
        )));
    }
    Ok(exponent)
}

/// Returns `2^exponent`, for the exponents of normal numbers.
pub(crate) fn power_of_two(exponent: i32) -> f64 {
    2f64.powi(exponent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponents_bracket_their_number() {
        for power in [-479, -100, -1, 0, 1, 3, 100, 480] {
            let edge = power_of_two(power - 1);
            assert_eq!(binary_exponent(edge).unwrap(), power, "2^{}", power - 1);
            assert_eq!(binary_exponent(edge * (2.0 - f64::EPSILON)).unwrap(), power, "below 2^{power}");
        }
        for outside in [power_of_two(480), power_of_two(-482), f64::MAX, f64::MIN_POSITIVE, 5e-324] {
            assert!(matches!(binary_exponent(outside), Err(Error::Numerical(_))), "{outside:e}");
        }
    }
}
