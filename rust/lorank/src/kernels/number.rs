//! float32 and float64, for kernels that are written once.
//!
//! faer's matrices are generic already; this adds vectors. Kernels take the widest that the machine
//! has, see [`simd`](crate::kernels::simd).

// Measured: left to the compiler's judgement, every vector instruction becomes a call, 20 times slower.
#![allow(clippy::inline_always)]

use std::ops::{Add, Div, Mul, MulAssign, Neg, Sub, SubAssign};

use faer::traits::RealField;
use pulp::Simd;
use pulp::bytemuck::Pod;

/// A real number with vectors of its kind.
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
    /// A vector of them.
    type Vector<S: Simd>: Copy;

    /// The distance from 1 to the next number.
    const EPSILON: f64;
    /// The smallest normal number.
    const SMALLEST: Self;

    /// Numbers in the widest vector of any machine: panels are padded to multiples of it.
    const WIDEST: usize;

    /// Numbers in a vector.
    fn lanes<S: Simd>() -> usize;
    /// The numbers of vectors.
    fn lanes_of<S: Simd>(vectors: &[Self::Vector<S>]) -> &[Self];
    /// The nearest number of this kind.
    fn of(x: f64) -> Self;
    /// The same number; exact.
    fn of_f32(x: f32) -> Self;
    /// The same number; exact.
    fn to_f64(self) -> f64;
    /// The nearest float32.
    fn to_f32(self) -> f32;
    /// Its square root.
    #[must_use]
    fn root(self) -> Self;
    /// The number in every lane.
    fn splat<S: Simd>(simd: S, x: Self) -> Self::Vector<S>;
    /// `a * b + c`.
    fn mul_add<S: Simd>(
        simd: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        c: Self::Vector<S>,
    ) -> Self::Vector<S>;
    /// `a + b`.
    fn plus<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// `a * b`.
    fn times<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// The sum of all lanes.
    fn sum<S: Simd>(simd: S, a: Self::Vector<S>) -> Self;
    /// Numbers as vectors; what fills no vector is left out.
    fn vectors<S: Simd>(values: &[Self]) -> &[Self::Vector<S>];
    /// The same to write to.
    fn vectors_mut<S: Simd>(values: &mut [Self]) -> &mut [Self::Vector<S>];
}

/// A count of numbers, rounded up to whole vectors of any machine.
#[must_use]
pub(crate) const fn padded<T: Number>(count: usize) -> usize {
    count.next_multiple_of(T::WIDEST)
}

/// Numbers from the beginning of one column to that of the next: as [`padded`], and a vector more where columns would
/// begin quarters of a page apart, and take each other's place in a cache.
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
            #[allow(clippy::cast_possible_truncation)] // Rounding is what is asked for.
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
            #[allow(clippy::cast_possible_truncation)] // Rounding is what is asked for.
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
