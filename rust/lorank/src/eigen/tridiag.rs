//! Reduction of a symmetric matrix to tridiagonal form: `A = Q T Q^T`, without storing `Q`.
//!
//! Large matrices are reduced in two stages, to a band ([`band`](mod@crate::eigen::band)) and then to
//! tridiagonal form ([`bulge`](mod@crate::eigen::bulge)). Small ones, which fit into cache, take one stage
//! ([`one_stage`](crate::eigen::one_stage)).

use faer::dyn_stack::{MemStack, StackReq};
use faer::prelude::Reborrow;
use faer::{MatMut, MatRef};

use crate::eigen::band::{reduce_to_band, reduce_to_band_scratch};
use crate::eigen::band_layout::{position, storage};
use crate::eigen::bulge::{reduce_to_tridiagonal, reduce_to_tridiagonal_scratch};
use crate::eigen::one_stage::{one_stage_scratch, reduce_in_one_stage};
use crate::eigen::tridiagonal::Tridiagonal;
use crate::exec::cancel::CancelToken;
use crate::exec::parallel::Strategy;
use crate::kernels::number::{Number, padded};
use crate::kernels::simd::LINE;

/// Returns the least order for which two stages were faster than one. A cache holds more float32 numbers.
const fn two_stages_from<T: Number>() -> usize {
    if size_of::<T>() == size_of::<f32>() { 384 } else { 320 }
}

/// Returns the memory for [`tridiagonalize`] of a matrix of order `n`.
#[must_use]
pub fn tridiagonalize_scratch<T: Number>(n: usize) -> StackReq {
    if n < two_stages_from::<T>() {
        StackReq::new_aligned::<T>(padded::<T>(n).pow(2), LINE).and(one_stage_scratch::<T>(n))
    } else {
        StackReq::new_aligned::<T>(storage(n), LINE)
            .and(reduce_to_band_scratch::<T>(n).or(reduce_to_tridiagonal_scratch::<T>(n)))
    }
}

/// Reduces a symmetric matrix by Householder reflections, in `4/3 n^3` operations at the speed of GEMM and
/// some `200 n^2` others. Reads the lower triangle of `a (n, n)` and overwrites `a`. Entries must be far from
/// the ends of the range of numbers, as their squares and products are formed.
///
/// Under [`Strategy::Together`] the caller must run in the thread pool. After cancellation the result is
/// unspecified.
#[must_use]
pub fn tridiagonalize<T: Number>(
    a: MatMut<'_, T>,
    strategy: Strategy,
    cancel: &CancelToken,
    stack: &mut MemStack,
) -> Tridiagonal {
    if a.nrows() < two_stages_from::<T>() {
        in_one_stage(a.rb(), stack)
    } else {
        in_two_stages(a, strategy, cancel, stack)
    }
}

fn in_one_stage<T: Number>(a: MatRef<'_, T>, stack: &mut MemStack) -> Tridiagonal {
    let (n, stride) = (a.nrows(), padded::<T>(a.nrows()));
    let (mut rows, stack) = stack.make_aligned_with(stride * stride, LINE, |_| T::default());
    for (j, column) in a.col_iter().enumerate() {
        for (i, x) in column.iter().enumerate().skip(j) {
            rows[j * stride + i] = *x;
            rows[i * stride + j] = *x;
        }
    }
    reduce_in_one_stage(&mut rows, n, None, stack)
}

fn in_two_stages<T: Number>(
    a: MatMut<'_, T>,
    strategy: Strategy,
    cancel: &CancelToken,
    stack: &mut MemStack,
) -> Tridiagonal {
    let n = a.nrows();
    let (mut band, stack) = stack.make_aligned_with(storage(n), LINE, |_| T::default());
    reduce_to_band(a, strategy, cancel, &mut band, stack);
    reduce_to_tridiagonal(&mut band, n, strategy, cancel, stack);
    Tridiagonal {
        diagonal: (0..n).map(|i| band[position(i, i)].to_f64()).collect(),
        off_diagonal: (1..n).map(|i| band[position(i, i - 1)].to_f64()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use faer::Mat;

    use super::*;
    use crate::exec::parallel;
    use crate::exec::scratch::Scratch;

    fn reduced<T: Number>(mut a: Mat<T>, strategy: Strategy) -> Tridiagonal {
        let mut scratch = Scratch::default();
        let stack = scratch.stack(tridiagonalize_scratch::<T>(a.nrows())).unwrap();
        tridiagonalize(a.as_mut(), strategy, &CancelToken::default(), stack)
    }

    /// Returns a dense symmetric matrix of pseudo-random entries, with NaN in the upper triangle, which must
    /// not be read.
    fn symmetric(n: usize) -> Mat<f64> {
        Mat::from_fn(n, n, |i, j| {
            if i < j { f64::NAN } else { ((i * 131 + j * 31 + i * j) % 97) as f64 / 97.0 - 0.4 }
        })
    }

    fn assert_survive<T: Number>(n: usize) {
        let a = symmetric(n);
        let found = reduced(Mat::from_fn(n, n, |i, j| T::of(a[(i, j)])), Strategy::Alone);
        assert_eq!((found.diagonal.len(), found.off_diagonal.len()), (n, n - 1));
        // The same solver for both matrices, so that only the reduction can cause a difference.
        let sorted = |matrix: nalgebra::DMatrix<f64>| {
            let mut values: Vec<f64> = matrix.symmetric_eigenvalues().iter().copied().collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let dense = sorted(nalgebra::DMatrix::from_fn(n, n, |i, j| a[(i.max(j), i.min(j))]));
        let reduced = sorted(nalgebra::DMatrix::from_fn(n, n, |i, j| match i.abs_diff(j) {
            0 => found.diagonal[i],
            1 => found.off_diagonal[i.min(j)],
            _ => 0.0,
        }));
        let norm = dense.iter().fold(0.0f64, |norm, x| norm.max(x.abs()));
        for (x, y) in reduced.iter().zip(&dense) {
            assert!((x - y).abs() <= 16.0 * n as f64 * T::EPSILON * norm, "order {n}: {x} {y}");
        }
    }

    #[test]
    fn eigenvalues_are_preserved() {
        let (single, double) = (two_stages_from::<f32>(), two_stages_from::<f64>());
        for n in [1, 2, 3, 4, 5, 31, 64, 100, double - 1, double, 400] {
            assert_survive::<f64>(n);
        }
        for n in [1, 2, 31, single - 1, single, 192, 400] {
            assert_survive::<f32>(n);
        }
    }

    #[test]
    fn empty_and_zero_matrices() {
        let empty = reduced(Mat::<f64>::zeros(0, 0), Strategy::Alone);
        assert!(empty.diagonal.is_empty() && empty.off_diagonal.is_empty());
        let zero = reduced(Mat::<f64>::zeros(6, 6), Strategy::Alone);
        assert!(zero.diagonal.iter().chain(&zero.off_diagonal).all(|&x| x == 0.0));
    }

    #[test]
    fn bits_are_independent_of_threads() {
        let n = 1025;
        let with =
            |threads| parallel::pool(threads).unwrap().install(|| reduced(symmetric(n), Strategy::Together));
        let (one, four) = (with(1), with(4));
        let bits = |values: &[f64]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&one.diagonal), bits(&four.diagonal));
        assert_eq!(bits(&one.off_diagonal), bits(&four.off_diagonal));
        // Similarity transformations preserve the trace and the Frobenius norm.
        let a = symmetric(n);
        let trace: f64 = (0..n).map(|i| a[(i, i)]).sum();
        let square = |i: usize, j: usize| a[(i, j)] * a[(i, j)] * if i == j { 1.0 } else { 2.0 };
        let squares: f64 = (0..n).map(|i| (0..=i).map(|j| square(i, j)).sum::<f64>()).sum();
        let reduced_trace: f64 = one.diagonal.iter().sum();
        let reduced_squares: f64 = one.diagonal.iter().map(|x| x * x).sum::<f64>()
            + 2.0 * one.off_diagonal.iter().map(|x| x * x).sum::<f64>();
        assert!((reduced_trace - trace).abs() < 1e-12 * squares.sqrt() * n as f64);
        assert!((reduced_squares / squares - 1.0).abs() < 1e-12);
    }
}
