//! Eigenvalues of `W^T W` in float64 arithmetic.
//!
//! `W` is scaled by a power of two so that its largest entry is near 1, multiplied into a Gram
//! matrix of order `p = min(out, in)` ([`gram`](mod@crate::gram)), reduced to tridiagonal form
//! ([`tridiag`](crate::tridiag)), and solved there ([`root_free_ql`](crate::root_free_ql)). The absolute error of an eigenvalue is a small
//! multiple of `eps(float64) * lambda_max`, so eigenvalues down to `1e-6 lambda_max` (singular
//! values down to a thousandth of the largest) come with nine or more correct digits.

use faer::linalg::{temp_mat_scratch, temp_mat_zeroed};
use faer::mat::AsMatMut;
use faer::prelude::ReborrowMut;

use crate::cancel::CancelToken;
use crate::gram::{gram, gram_scratch};
use crate::matrix::MatrixView;
use crate::parallel::{Strategy, pool};
use crate::root_free_ql::tridiagonal_eigenvalues;
use crate::spectrum::Spectrum;
use crate::tridiag::{tridiagonalize, tridiagonalize_scratch};
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
    let steps = gram_scratch(view.rows(), view.cols()).or(tridiagonalize_scratch(p));
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
