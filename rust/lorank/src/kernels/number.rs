//! The trait of float32 and float64, for kernels that are generic over the precision.
//!
//! The trait adds SIMD vectors to faer's `RealField`. Kernels use the widest vectors of the machine: see
//! [`simd`](crate::kernels::simd).

// Measured without forced inlining: every vector instruction becomes a call, and kernels are 20 times slower.
#![allow(clippy::inline_always)]

use std::ops::{Add, Div, Mul, MulAssign, Neg, Sub, SubAssign};

use faer::traits::RealField;
use pulp::Simd;
use pulp::bytemuck::Pod;

/// A real number type with SIMD vectors: float32 or float64.
pub trait Number:
    RealField
    + Pod
    + Copy
    + Default
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + MulAssign
    + SubAssign
{
    /// A vector of this type.
    type Vector<S: Simd>: Copy;

    /// Distance from 1 to the next number.
    const EPSILON: f64;
    /// Smallest positive normal number.
    const SMALLEST: Self;

    /// Number of elements of the widest vector of any machine. Panels are padded to multiples of it.
    const WIDEST: usize;

    /// Returns the number of elements of a vector.
    fn lanes<S: Simd>() -> usize;
    /// Casts vectors to a slice of their elements.
    fn lanes_of<S: Simd>(vectors: &[Self::Vector<S>]) -> &[Self];
    /// Rounds to the nearest number of this type.
    fn of(x: f64) -> Self;
    /// Converts exactly.
    fn of_f32(x: f32) -> Self;
    /// Converts exactly.
    fn to_f64(self) -> f64;
    /// Rounds to the nearest float32.
    fn to_f32(self) -> f32;
    /// Returns the square root.
    #[must_use]
    fn root(self) -> Self;
    /// Returns a vector whose elements are all `x`.
    fn splat<S: Simd>(simd: S, x: Self) -> Self::Vector<S>;
    /// Returns `a * b + c`.
    fn mul_add<S: Simd>(
        simd: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        c: Self::Vector<S>,
    ) -> Self::Vector<S>;
    /// Returns `a + b`.
    fn plus<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// Returns `a * b`.
    fn times<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// Returns the sum of the elements.
    fn sum<S: Simd>(simd: S, a: Self::Vector<S>) -> Self;
    /// Casts a slice to vectors, without the remainder that fills no vector.
    fn vectors<S: Simd>(values: &[Self]) -> &[Self::Vector<S>];
    /// Casts a mutable slice to vectors, without the remainder that fills no vector.
    fn vectors_mut<S: Simd>(values: &mut [Self]) -> &mut [Self::Vector<S>];
}

/// Rounds a number of elements up to whole vectors of any machine.
#[must_use]
pub(crate) const fn padded<T: Number>(count: usize) -> usize {
    count.next_multiple_of(T::WIDEST)
}

/// Returns the distance between the first elements of adjacent columns: [`padded`], plus one vector if
/// columns would begin at multiples of a quarter page and compete for the same cache sets.
#[must_use]
pub(crate) const fn spaced<T: Number>(rows: usize) -> usize {
    const APART: usize = 1024;
    let numbers = padded::<T>(rows);
    if (numbers * size_of::<T>()).is_multiple_of(APART) { numbers + T::WIDEST } else { numbers }
}

macro_rules! number {
    (
        $number:ident, $vector:ident, $lanes:ident, $splat:ident, $mul_add:ident, $add:ident, $mul:ident, $sum:ident,
        $vectors:ident, $vectors_mut:ident
    ) => {
        impl Number for $number {
            type Vector<S: Simd> = S::$vector;

            const EPSILON: f64 = $number::EPSILON as f64;
            const SMALLEST: Self = $number::MIN_POSITIVE;
            const WIDEST: usize = 64 / size_of::<$number>();

            #[inline(always)]
            fn lanes<S: Simd>() -> usize {
                S::$lanes
            }
            #[inline(always)]
            fn lanes_of<S: Simd>(vectors: &[S::$vector]) -> &[$number] {
                pulp::bytemuck::cast_slice(vectors)
            }
            #[inline(always)]
            #[allow(clippy::cast_possible_truncation)] // Rounding is intended.
            fn of(x: f64) -> Self {
                x as $number
            }
            #[inline(always)]
            fn of_f32(x: f32) -> Self {
                $number::from(x)
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            #[allow(clippy::cast_possible_truncation)] // Rounding is intended.
            fn to_f32(self) -> f32 {
                self as f32
            }
            #[inline(always)]
            fn root(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn splat<S: Simd>(simd: S, x: Self) -> S::$vector {
                simd.$splat(x)
            }
            #[inline(always)]
            fn mul_add<S: Simd>(simd: S, a: S::$vector, b: S::$vector, c: S::$vector) -> S::$vector {
                simd.$mul_add(a, b, c)
            }
            #[inline(always)]
            fn plus<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$add(a, b)
            }
            #[inline(always)]
            fn times<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$mul(a, b)
            }
            #[inline(always)]
            fn sum<S: Simd>(simd: S, a: S::$vector) -> Self {
                simd.$sum(a)
            }
            #[inline(always)]
            fn vectors<S: Simd>(values: &[Self]) -> &[S::$vector] {
                S::$vectors(values).0
            }
            #[inline(always)]
            fn vectors_mut<S: Simd>(values: &mut [Self]) -> &mut [S::$vector] {
                S::$vectors_mut(values).0
            }
        }
    };
}

number!(
    f64,
    f64s,
    F64_LANES,
    splat_f64s,
    mul_add_e_f64s,
    add_f64s,
    mul_f64s,
    reduce_sum_f64s,
    as_simd_f64s,
    as_mut_simd_f64s
);
number!(
    f32,
    f32s,
    F32_LANES,
    splat_f32s,
    mul_add_e_f32s,
    add_f32s,
    mul_f32s,
    reduce_sum_f32s,
    as_simd_f32s,
    as_mut_simd_f32s
);
