//! Exact sums of squares.

use crate::low_rank::select::Range;

/// Squares as integers, in a unit for which their sum fits into 128 bits.
///
/// The largest square has some 100 bits. The bits that a smaller square loses are below the precision of any
/// float64 sum.
#[derive(Clone, Copy)]
pub(super) struct Squares {
    /// Biased exponent of the largest value.
    exponent: u64,
    /// Number of bits by which mantissas are shifted up if all values are subnormal, whose mantissas are
    /// shorter.
    lift: u32,
    /// Number of bits by which squares are shifted down, so that the sum of `count` squares of 106 bits does
    /// not overflow.
    spare: u64,
}

impl Squares {
    pub(super) fn new(count: usize, range: Range) -> Self {
        let (_, high) = range.unwrap_or((1, 1));
        let (mantissa, exponent) = parts(high);
        let carries = u64::from(usize::BITS - count.leading_zeros());
        Self { exponent, lift: mantissa.leading_zeros() - 11, spare: carries.saturating_sub(22) }
    }

    #[inline]
    pub(super) fn of(self, bits: u64) -> u128 {
        let (mantissa, exponent) = parts(bits);
        let mantissa = u128::from(mantissa << self.lift);
        (mantissa * mantissa) >> (2 * (self.exponent - exponent) + self.spare).min(127)
    }
}

/// Returns the mantissa as an integer, and the biased exponent (1 for subnormal numbers, too).
#[inline]
fn parts(bits: u64) -> (u64, u64) {
    let (fraction, exponent) = (bits & ((1 << 52) - 1), bits >> 52);
    (fraction | (u64::from(exponent > 0) << 52), exponent.max(1))
}

/// Returns the exponent of the number with a given pattern, or the smallest normal exponent for subnormal
/// numbers.
pub(super) fn exponent(bits: u64) -> i32 {
    i32::try_from(parts(bits).1).unwrap_or(0) - 1023
}
