//! Reduction of a symmetric matrix to tridiagonal form: `A = Q T Q^T`, `T` kept, `Q` dropped.

use std::num::NonZero;

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::tridiag::{tridiag_in_place, tridiag_in_place_scratch};
use faer::{Mat, Par};

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

/// Reduces the symmetric matrix in the lower triangle of `a`, `(n, n)`, by Householder reflections:
/// `4/3 n^3` operations, half of them at the speed of memory (one stage; level 2 of the BLAS).
///
/// Under [`Strategy::Together`] this must run inside the thread pool that it may use.
#[must_use]
pub fn tridiagonalize(mut a: Mat<f64>, strategy: Strategy) -> Tridiagonal {
    let n = a.nrows();
    let par =
        if strategy == Strategy::Together && n >= PARALLEL_FROM { Par::Rayon(PIECES) } else { Par::Seq };
    // One reflection per block: their products are only needed for eigenvectors.
    let mut reflections = Mat::zeros(1, n.saturating_sub(1));
    let mut memory = MemBuffer::new(tridiag_in_place_scratch::<f64>(n, par, faer::Spec::default()));
    let stack = MemStack::new(&mut memory);
    tridiag_in_place(a.as_mut(), reflections.as_mut(), par, stack, faer::Spec::default());
    Tridiagonal {
        diagonal: (0..n).map(|i| a[(i, i)]).collect(),
        off_diagonal: (1..n).map(|i| a[(i, i - 1)]).collect(),
    }
}
