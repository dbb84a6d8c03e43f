//! Eigenvalues of `W^T W` in float64 arithmetic.
//!
//! `W` is scaled by a power of two so that its largest entry is near 1, multiplied into a Gram
//! matrix of order `p = min(out, in)` ([`gram`](mod@crate::gram)), reduced to tridiagonal form
//! ([`tridiag`](crate::tridiag)), and solved there. The absolute error of an eigenvalue is a small
//! multiple of `eps(float64) * lambda_max`, so eigenvalues down to `1e-6 lambda_max` (singular
//! values down to a thousandth of the largest) come with nine or more correct digits.

use faer::diag::{Diag, DiagRef};
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::tridiagonal_self_adjoint_evd;
use faer::linalg::{temp_mat_scratch, temp_mat_zeroed};
use faer::mat::AsMatMut;
use faer::prelude::ReborrowMut;
use faer::{Par, Spec};

use crate::cancel::CancelToken;
use crate::gram::{gram, gram_scratch};
use crate::matrix::MatrixView;
use crate::parallel::{Strategy, pool};
use crate::spectrum::Spectrum;
use crate::tridiag::{Tridiagonal, tridiagonalize, tridiagonalize_scratch};
use crate::workspace::Scratch;
use crate::{Error, Result};

/// Largest binary exponent of an entry (and smallest, negated) whose square, times any number of
/// entries, stays a normal float64.
const EXPONENT_LIMIT: i32 = 480;

/// The eigenvalues of `W^T W` with up to `threads` threads (the result does not depend on them).
///
/// # Errors
/// [`Error::Numerical`] if `W` holds NaN or infinite values, or if its entries are so large or
/// small (beyond `2^±480`) that eigenvalues leave the range of float64; [`Error::Cancelled`].
pub fn spectrum(view: &MatrixView<'_>, threads: usize, cancel: &CancelToken) -> Result<Spectrum> {
    let mut scratch = Scratch::default();
    let strategy = Strategy::for_shape(view.rows(), view.cols());
    let mut work = || spectrum_in_pool(view, strategy, cancel, &mut scratch);
    match strategy {
        Strategy::Alone => work(),
        Strategy::Together => pool(threads)?.install(work),
    }
}

/// [`spectrum`] for a caller who already runs inside the thread pool to use, and keeps memory for it.
///
/// # Errors
/// As [`spectrum`], and [`Error::Numerical`] if memory runs out.
pub fn spectrum_in_pool(
    view: &MatrixView<'_>,
    strategy: Strategy,
    cancel: &CancelToken,
    scratch: &mut Scratch,
) -> Result<Spectrum> {
    let p = view.rows().min(view.cols());
    let largest = view.max_abs()?;
    if largest == 0.0 {
        return Spectrum::new(vec![0.0; p]);
    }
    let exponent = binary_exponent(largest)?;
    let steps = gram_scratch(view.rows(), view.cols()).or(tridiagonalize_scratch(p, strategy));
    let stack = scratch.stack(temp_mat_scratch::<f64>(p, p).and(steps))?;
    let (mut a, stack) = temp_mat_zeroed::<f64, _, _>(p, p, stack);
    let mut a = a.as_mat_mut();
    gram(view, power_of_two(-exponent), strategy, cancel, a.rb_mut(), stack)?;
    cancel.check()?;
    let tridiagonal = tridiagonalize(a, strategy, stack);
    cancel.check()?;
    let mut eigenvalues = tridiagonal_eigenvalues(&tridiagonal)?;
    for value in &mut eigenvalues {
        // W^T W has no negative eigenvalues; rounding leaves some a little below zero.
        *value = value.max(0.0) * power_of_two(2 * exponent);
    }
    Spectrum::new(eigenvalues)
}

/// The eigenvalues of a symmetric tridiagonal matrix, ascending.
///
/// # Errors
/// [`Error::NoConvergence`] if the implicit QR iteration does not end.
pub fn tridiagonal_eigenvalues(matrix: &Tridiagonal) -> Result<Vec<f64>> {
    let n = matrix.diagonal.len();
    let mut eigenvalues = Diag::<f64>::zeros(n);
    // Two copies of a diagonal. `self_adjoint_evd_scratch` counts a dense matrix in, for the reduction.
    let mut memory = MemBuffer::new(temp_mat_scratch::<f64>(n, 1).array(2));
    tridiagonal_self_adjoint_evd(
        DiagRef::from_slice(&matrix.diagonal),
        DiagRef::from_slice(&matrix.off_diagonal),
        eigenvalues.as_mut(),
        None,
        Par::Seq,
        MemStack::new(&mut memory),
        Spec::default(),
    )
    .map_err(|_| Error::NoConvergence("the tridiagonal eigenvalue iteration"))?;
    Ok(eigenvalues.column_vector().iter().copied().collect())
}

/// The exponent `e` with `2^(e-1) <= x < 2^e`.
pub(crate) fn binary_exponent(x: f64) -> Result<i32> {
    // Read from the bits: the logarithm of a number just below a power of two may round up to it.
    let exponent = ((x.to_bits() >> 52) & 0x7ff) as i32 - 1022;
    if exponent.abs() > EXPONENT_LIMIT {
        return Err(Error::Numerical(format!(
            "its largest absolute value is {x:e}: the squares leave the range of float64; rescale the matrix"
        )));
    }
    Ok(exponent)
}

/// `2^exponent` for exponents of normal numbers.
pub(crate) fn power_of_two(exponent: i32) -> f64 {
    2f64.powi(exponent)
}

#[cfg(test)]
mod tests {
    use std::f64::consts::PI;

    use super::*;

    fn eigenvalues(diagonal: Vec<f64>, off_diagonal: Vec<f64>) -> Vec<f64> {
        tridiagonal_eigenvalues(&Tridiagonal { diagonal, off_diagonal }).unwrap()
    }

    #[test]
    fn wilkinson_21() {
        // Diagonal 10, 9, ..., 0, ..., 9, 10: pairs of eigenvalues that agree to 14 digits.
        let found = eigenvalues((-10..=10).map(|i| f64::from(i).abs()).collect(), vec![1.0; 20]);
        for (x, expected) in found.iter().rev().zip([
            10.746_194_182_903_393,
            10.746_194_182_903_322,
            9.210_678_647_361_332,
            9.210_678_647_304_919,
            8.038_941_122_829_024,
            8.038_941_115_814_274,
        ]) {
            assert!((x - expected).abs() < 1e-13, "{x} {expected}");
        }
        assert!((found[0] + 1.125_441_522_119_984).abs() < 1e-13, "{}", found[0]);
    }

    #[test]
    fn second_differences() {
        for n in [1, 2, 3, 10, 257, 1500] {
            let found = eigenvalues(vec![2.0; n], vec![-1.0; n - 1]);
            for (k, x) in (1..).zip(&found) {
                let expected = 2.0 - 2.0 * (f64::from(k) * PI / (n as f64 + 1.0)).cos();
                assert!((x - expected).abs() <= 4.0 * n as f64 * f64::EPSILON * 4.0, "n = {n}, k = {k}");
            }
        }
    }

    #[test]
    fn diagonal_and_empty() {
        assert!(eigenvalues(vec![], vec![]).is_empty());
        let found = eigenvalues(vec![3.0, -1.0, 2.0], vec![0.0, 0.0]);
        assert_eq!(
            found.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
            [-1.0f64, 2.0, 3.0].map(f64::to_bits)
        );
    }

    #[test]
    fn what_is_not_a_number_does_not_converge() {
        let matrix = Tridiagonal { diagonal: vec![f64::NAN, 1.0, 2.0], off_diagonal: vec![1.0, 1.0] };
        assert!(matches!(tridiagonal_eigenvalues(&matrix), Err(Error::NoConvergence(_))));
    }

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
