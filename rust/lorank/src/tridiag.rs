//! Reduction of a symmetric matrix to tridiagonal form: `A = Q T Q^T`, `T` kept, `Q` dropped.

use std::num::NonZero;

use faer::dyn_stack::{MemStack, StackReq};
use faer::linalg::evd::tridiag::{tridiag_in_place, tridiag_in_place_scratch};
use faer::linalg::{temp_mat_scratch, temp_mat_zeroed};
use faer::mat::AsMatMut;
use faer::prelude::ReborrowMut;
use faer::{MatMut, Par, Spec};

use crate::parallel::Strategy;

/// A symmetric tridiagonal matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Tridiagonal {
    /// The `n` diagonal entries.
    pub diagonal: Vec<f64>,
    /// The `n - 1` entries beside the diagonal.
    pub off_diagonal: Vec<f64>,
}

/// Order from which the reduction gains from threads.
const PARALLEL_FROM: usize = 1024;

/// Pieces that each step is cut into. A constant, not the number of threads: the pieces' partial
/// sums are added up, so the bits depend on it. The work is bound by memory, and more pieces than
/// this saturate no memory system that they have been tried on.
const PIECES: NonZero<usize> = NonZero::new(8).unwrap();

/// The memory that [`tridiagonalize`] of a matrix of order `n` needs.
#[must_use]
pub fn tridiagonalize_scratch(n: usize, strategy: Strategy) -> StackReq {
    temp_mat_scratch::<f64>(1, n).and(tridiag_in_place_scratch::<f64>(n, par(n, strategy), Spec::default()))
}

/// Reduces the symmetric matrix in the lower triangle of `a`, `(n, n)`, by Householder reflections:
/// `4/3 n^3` operations, half of them at the speed of memory (one stage; level 2 of the BLAS). What
/// `a` held is lost.
///
/// Under [`Strategy::Together`] this must run inside the thread pool that it may use.
#[must_use]
pub fn tridiagonalize(mut a: MatMut<'_, f64>, strategy: Strategy, stack: &mut MemStack) -> Tridiagonal {
    let n = a.nrows();
    // One reflection per block: their products are only needed for eigenvectors.
    let (mut reflections, stack) = temp_mat_zeroed::<f64, _, _>(1, n.saturating_sub(1), stack);
    tridiag_in_place(a.rb_mut(), reflections.as_mat_mut(), par(n, strategy), stack, Spec::default());
    Tridiagonal {
        diagonal: (0..n).map(|i| a[(i, i)]).collect(),
        off_diagonal: (1..n).map(|i| a[(i, i - 1)]).collect(),
    }
}

fn par(n: usize, strategy: Strategy) -> Par {
    if strategy == Strategy::Together && n >= PARALLEL_FROM { Par::Rayon(PIECES) } else { Par::Seq }
}

#[cfg(test)]
mod tests {
    use faer::Mat;

    use super::*;
    use crate::parallel;
    use crate::workspace::Scratch;

    fn reduce(mut a: Mat<f64>, strategy: Strategy) -> Tridiagonal {
        let mut scratch = Scratch::default();
        let stack = scratch.stack(tridiagonalize_scratch(a.nrows(), strategy)).unwrap();
        tridiagonalize(a.as_mut(), strategy, stack)
    }

    /// Symmetric, dense, from a small linear congruence; NaN above the diagonal, which must not be read.
    fn symmetric(n: usize) -> Mat<f64> {
        Mat::from_fn(n, n, |i, j| {
            if i < j { f64::NAN } else { ((i * 131 + j * 31 + i * j) % 97) as f64 / 97.0 - 0.4 }
        })
    }

    #[test]
    fn eigenvalues_survive() {
        for n in [1, 2, 3, 4, 5, 31, 64, 100] {
            let a = symmetric(n);
            let found = reduce(a.clone(), Strategy::Alone);
            assert_eq!((found.diagonal.len(), found.off_diagonal.len()), (n, n - 1));
            // The same solver on both sides, so that a difference can only come from the reduction.
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
                assert!((x - y).abs() <= 16.0 * n as f64 * f64::EPSILON * norm, "order {n}: {x} {y}");
            }
        }
    }

    #[test]
    fn nothing_to_reduce() {
        let empty = reduce(Mat::zeros(0, 0), Strategy::Alone);
        assert!(empty.diagonal.is_empty() && empty.off_diagonal.is_empty());
        let zero = reduce(Mat::zeros(6, 6), Strategy::Alone);
        assert!(zero.diagonal.iter().chain(&zero.off_diagonal).all(|&x| x == 0.0));
    }

    #[test]
    fn pieces_are_independent_of_threads() {
        let n = PARALLEL_FROM + 1;
        let with =
            |threads| parallel::pool(threads).unwrap().install(|| reduce(symmetric(n), Strategy::Together));
        let (one, four) = (with(1), with(4));
        let bits = |values: &[f64]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&one.diagonal), bits(&four.diagonal));
        assert_eq!(bits(&one.off_diagonal), bits(&four.off_diagonal));
        // Trace and Frobenius norm are invariants of the similarity.
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
